//! A GPU with the kernels for products, and random operands.

use std::time::{SystemTime, UNIX_EPOCH};

use bytemuck::cast_slice;
use half::bf16;
use minisgl_core::backend::{Device, Element, Purpose, Queue};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::gemm::{Gemm, RowNorm};
use minisgl_cuda::{Buffer, Cuda, Options};

pub struct Gpu {
    pub cuda: Cuda,
    pub gemm: Gemm,
    seed: u64,
}

impl Gpu {
    pub fn new() -> Gpu {
        let mut cuda = Cuda::new(&Options::default()).expect("a GPU");
        let gemm = Gemm::new(&mut cuda).unwrap();
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        println!("seed {seed}");
        Gpu { cuda, gemm, seed }
    }

    pub fn next(&mut self) -> u64 {
        self.seed = splitmix64(self.seed);
        self.seed
    }

    pub fn upload<T: bytemuck::Pod>(&mut self, element: Element, values: &[T]) -> Buffer {
        let bytes: &[u8] = cast_slice(values);
        let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect();
        let elements = if element == Element::Activation { words.len() * 2 } else { words.len() };
        let buffer = self.cuda.alloc(Purpose::Scratch, element, elements).unwrap();
        let mut pinned = self.cuda.alloc_pinned(words.len()).unwrap();
        self.cuda.words_mut(&mut pinned).unwrap().copy_from_slice(&words);
        self.cuda.upload(&mut pinned, 0..words.len(), buffer).unwrap();
        self.cuda.synchronize().unwrap();
        buffer
    }

    pub fn download(&mut self, buffer: Buffer) -> Vec<u32> {
        let words = buffer.bytes() / 4;
        let mut pinned = self.cuda.alloc_pinned(words).unwrap();
        self.cuda.download(Queue::Compute, buffer, words, &mut pinned).unwrap();
        self.cuda.words(&pinned).unwrap().to_vec()
    }

    pub fn activations(&mut self, count: usize) -> Buffer {
        let seed = self.next();
        let value =
            |i| bf16::from_f32((splitmix64(seed.wrapping_add(i)) >> 40) as f32 / (1 << 23) as f32 - 1.0);
        let values: Vec<bf16> = (0..count as u64).map(value).collect();
        self.upload(Element::Activation, &values)
    }

    /// Each token's norm, from random sums of squares, and these sums.
    pub fn norm(&mut self, tokens: usize, cols: usize) -> (RowNorm, Vec<f32>) {
        let segments = cols.div_ceil(64);
        let sums: Vec<f32> = (0..tokens * segments).map(|_| 1.0 + (self.next() >> 44) as f32 / 1e5).collect();
        let sumsq = self.upload(Element::Float, &sums).address();
        (RowNorm { sumsq, segments: segments as u32, hidden: cols as u32, eps: 1e-6 }, sums)
    }
}
