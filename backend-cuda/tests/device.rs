//! The GPU as core's `Device`: what goes up comes back, in order, recorded or not.

use minisgl_core::backend::{Device, Element, Memory, Purpose, Queue};
use minisgl_core::batch::{HEADER_WORDS, Header};
use minisgl_cuda::ops::embed::Ends;
use minisgl_cuda::{Buffer, Cuda, CudaError, Grid, Options, device_count};

fn cuda() -> Cuda {
    Cuda::new(&Options::default()).expect("a GPU")
}

/// Downloads all words of a buffer.
fn words(cuda: &mut Cuda, buffer: Buffer) -> Vec<u32> {
    let mut pinned = cuda.alloc_pinned(buffer.elements()).unwrap();
    cuda.download(Queue::Compute, buffer, buffer.elements(), &mut pinned).unwrap();
    cuda.words(&pinned).unwrap().to_vec()
}

fn upload(cuda: &mut Cuda, words: &[u32]) -> Buffer {
    let buffer = cuda.alloc(Purpose::Scratch, Element::Word, words.len()).unwrap();
    let mut pinned = cuda.alloc_pinned(words.len()).unwrap();
    cuda.words_mut(&mut pinned).unwrap().copy_from_slice(words);
    cuda.upload(&mut pinned, 0..words.len(), buffer).unwrap();
    buffer
}

#[test]
#[ignore = "needs a GPU"]
fn a_part_of_a_buffer_is_uploaded_and_the_rest_stays() {
    let mut cuda = cuda();
    let before: Vec<u32> = (0..1000).collect();
    let buffer = upload(&mut cuda, &before);
    let mut pinned = cuda.alloc_pinned(1000).unwrap();
    cuda.words_mut(&mut pinned).unwrap().fill(7);
    cuda.upload(&mut pinned, 100..333, buffer).unwrap();
    let after = words(&mut cuda, buffer);
    for (i, word) in after.iter().enumerate() {
        assert_eq!(*word, if (100..333).contains(&i) { 7 } else { i as u32 });
    }
    let slice = cuda.slice(buffer, 90..110);
    assert_eq!(words(&mut cuda, slice), after[90..110]);
}

#[test]
#[ignore = "needs a GPU"]
fn batches_that_wait_are_taken_in_turn_as_much_of_each_as_its_header_says() {
    const ROOM: usize = 70_000; // more than all blocks take at once
    let mut cuda = cuda();
    let ends = Ends::new(cuda.modules()).unwrap();
    let (halves, turn) = (upload(&mut cuda, &[0; 2 * ROOM]), upload(&mut cuda, &[0; 2]));
    let mut staging = [(); 2].map(|()| cuda.alloc_pinned(ROOM).unwrap());
    for (step, len) in [ROOM, HEADER_WORDS, 5_000, ROOM - 8, 1_000].into_iter().enumerate() {
        let (half, staging) = (step % 2, &mut staging[step % 2]);
        let header = Header { words: len as u32, ..Header::default() };
        let sent = cuda.words_mut(staging).unwrap();
        sent.fill(step as u32);
        sent[..HEADER_WORDS].copy_from_slice(bytemuck::cast_slice(&[header]));
        let sent = sent.to_vec();
        let (batch, waiting) =
            (upload(&mut cuda, &[u32::MAX; ROOM]), cuda.slice(halves, half * ROOM..(half + 1) * ROOM));
        cuda.upload_ahead(staging, 0..ROOM, waiting).unwrap();
        ends.take_batch(cuda.launcher(), halves, turn, batch).unwrap();
        let taken = words(&mut cuda, batch);
        assert_eq!(taken[..len], sent[..len], "step {step}");
        assert!(taken[len.next_multiple_of(4)..].iter().all(|word| *word == u32::MAX), "step {step}");
        assert_eq!(words(&mut cuda, turn), [1 - half as u32, 0]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_driver_compiles_nothing_on_hopper() {
    let cuda = cuda();
    let compiled: Vec<_> = cuda.modules().from_ptx().collect();
    assert_eq!(compiled.is_empty(), cuda.properties().hopper, "{compiled:?}");
}

#[test]
#[ignore = "needs a GPU"]
fn kv_memory_is_zero_when_it_is_allocated() {
    let mut cuda = cuda();
    let elements = 3 << 20;
    let kv = cuda.alloc(Purpose::KvCache, Element::Activation, elements).unwrap();
    let mut pinned = cuda.alloc_pinned(elements / 2).unwrap();
    cuda.words_mut(&mut pinned).unwrap().fill(u32::MAX);
    cuda.download(Queue::Compute, kv, elements / 2, &mut pinned).unwrap();
    assert!(cuda.words(&pinned).unwrap().iter().all(|word| *word == 0));
}

/// `page_table[i] = i + added` for `count` entries, by the kernel that begins a step.
struct Updates {
    kernel: minisgl_cuda::Kernel,
    batch: Buffer,
    table: Buffer,
    staging: minisgl_cuda::Pinned,
    count: u32,
}

impl Updates {
    fn new(cuda: &mut Cuda, count: u32) -> Updates {
        let kernel = cuda.modules().kernel("embed", "begin_step", 0).unwrap();
        let words = 16 + 2 * count as usize;
        Updates {
            kernel,
            batch: cuda.alloc(Purpose::Scratch, Element::Word, words).unwrap(),
            table: cuda.alloc(Purpose::Scratch, Element::Word, count as usize).unwrap(),
            staging: cuda.alloc_pinned(words).unwrap(),
            count,
        }
    }

    fn send(&mut self, cuda: &mut Cuda, added: u32) {
        let words = cuda.words_mut(&mut self.staging).unwrap();
        words[..16].fill(0);
        words[3] = self.count;
        for (i, update) in words[16..].chunks_exact_mut(2).enumerate() {
            update.copy_from_slice(&[i as u32, i as u32 + added]);
        }
        let len = words.len();
        cuda.upload(&mut self.staging, 0..len, self.batch).unwrap();
    }

    fn launch(&self, cuda: &Cuda) {
        let (grid, nowhere) = (Grid::new(8, 256), 0u64);
        // SAFETY: the updates' indices lie below the table's length, and by the header no slot is updated: slots and rules are not
        // touched.
        unsafe {
            cuda.launcher().launch_raw(
                &self.kernel,
                grid,
                [&self.batch, &16u32, &self.table, &nowhere, &nowhere],
            )
        }
        .unwrap();
    }

    fn expected(&self, added: u32) -> Vec<u32> {
        (0..self.count).map(|i| i + added).collect()
    }
}

#[test]
#[ignore = "needs a GPU"]
fn recorded_work_runs_when_it_is_replayed_and_reads_what_is_there_then() {
    let mut cuda = cuda();
    let mut updates = Updates::new(&mut cuda, 3000);
    updates.send(&mut cuda, 1);
    updates.launch(&cuda);
    assert_eq!(words(&mut cuda, updates.table), updates.expected(1));
    cuda.begin_capture().unwrap();
    updates.launch(&cuda);
    let graph = cuda.end_capture().unwrap();
    assert_eq!(words(&mut cuda, updates.table), updates.expected(1), "recording runs nothing");
    for added in [20, 300] {
        updates.send(&mut cuda, added);
        cuda.replay(&graph).unwrap();
        assert_eq!(words(&mut cuda, updates.table), updates.expected(added));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_copy_queue_waits_for_the_event_it_is_told_to_wait_for() {
    let mut cuda = cuda();
    let mut updates = Updates::new(&mut cuda, 100_000);
    let mut back = cuda.alloc_pinned(100_000).unwrap();
    let (mut start, mut done) = (cuda.event().unwrap(), cuda.event().unwrap());
    for added in 0..20 {
        updates.send(&mut cuda, added);
        cuda.record(Queue::Compute, &mut start).unwrap();
        for _ in 0..10 {
            updates.launch(&cuda);
        }
        cuda.record(Queue::Compute, &mut done).unwrap();
        cuda.wait(Queue::Copy, &done).unwrap();
        cuda.download(Queue::Copy, updates.table, 100_000, &mut back).unwrap();
        assert_eq!(cuda.words(&back).unwrap(), updates.expected(added));
        let ms = cuda.elapsed_ms(&start, &done).unwrap();
        assert!(ms > 0.0 && ms < 1000.0, "{ms} ms");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_launch_with_other_parameters_than_declared_is_refused_by_name() {
    let cuda = cuda();
    let kernel = cuda.modules().kernel("embed", "begin_step", 0).unwrap();
    // SAFETY: two parameters are too few, so the launch is not made.
    let short = unsafe { cuda.launcher().launch_raw(&kernel, Grid::new(1, 32), [&0u64, &0u32]) };
    assert!(matches!(&short, Err(CudaError::Parameters { kernel: "begin_step", .. })), "{short:?}");
    let (launcher, grid) = (cuda.launcher(), Grid::new(1, 32));
    // SAFETY: the third is too narrow, so the launch is not made.
    let narrow = unsafe { launcher.launch_raw(&kernel, grid, [&0u64, &0u32, &0u32, &0u64, &0u64]) };
    assert!(matches!(&narrow, Err(CudaError::Parameters { .. })), "{narrow:?}");
    assert!(matches!(
        cuda.modules().kernel("embed", "none", 0),
        Err(CudaError::NoKernel { kernel: "none", .. })
    ));
}

#[test]
#[ignore = "needs a GPU"]
fn a_kernel_that_several_look_up_may_have_the_most_shared_memory_that_one_of_them_wants() {
    let mut cuda = cuda();
    let nothing = upload(&mut cuda, &[0; HEADER_WORDS]);
    let look_up = |kib: u32| cuda.modules().kernel("embed", "begin_step", kib << 10).unwrap();
    let kernels = [60, 90, 70, 0].map(look_up);
    let grid = Grid::new(1, 256).shared(90 << 10);
    for kernel in &kernels {
        // SAFETY: by its header the batch updates nothing: none of the other addresses is touched.
        unsafe { cuda.launcher().launch_raw(kernel, grid, [&nothing, &0u32, &0u64, &0u64, &0u64]) }.unwrap();
    }
    cuda.synchronize().unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn a_copy_beyond_either_memory_is_refused() {
    let mut cuda = cuda();
    let buffer = cuda.alloc(Purpose::Scratch, Element::Word, 8).unwrap();
    let [mut wide, mut narrow] = [16, 4].map(|words| cuda.alloc_pinned(words).unwrap());
    let refused = |copied| matches!(copied, Err(CudaError::OutOfRange { .. }));
    assert!(refused(cuda.upload(&mut wide, 4..9, buffer)), "beyond the target");
    assert!(refused(cuda.upload(&mut narrow, 0..5, buffer)), "beyond the source");
    assert!(refused(cuda.download(Queue::Compute, buffer, 9, &mut wide)), "beyond the source");
    assert!(refused(cuda.download(Queue::Compute, buffer, 5, &mut narrow)), "beyond the target");
    cuda.upload(&mut wide, 4..8, buffer).unwrap();
    cuda.download(Queue::Compute, buffer, 8, &mut wide).unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn out_of_memory_says_what_was_needed_and_what_was_free() {
    let mut cuda = cuda();
    let Memory { total, .. } = cuda.memory().unwrap();
    let error = cuda.alloc(Purpose::KvCache, Element::Word, total as usize).unwrap_err();
    let CudaError::OutOfMemory { purpose: Purpose::KvCache, needed, free } = &error else {
        panic!("{error}")
    };
    assert!(*needed == total * 4 && *free < total);
    assert!(error.to_string().contains("--memory-ratio"), "{error}");
    // The device still works.
    let buffer = upload(&mut cuda, &[1, 2, 3]);
    assert_eq!(words(&mut cuda, buffer), [1, 2, 3]);
}

#[test]
#[ignore = "needs a GPU"]
fn a_device_beyond_the_last_is_refused() {
    let count = device_count().unwrap();
    let error = Cuda::new(&Options { device: count, ..Options::default() }).unwrap_err();
    assert_eq!(error, CudaError::DeviceIndex { index: count, count });
}

/// A wild kernel spoils the whole process's context, so this test runs in a process of its own.
#[test]
#[ignore = "needs a GPU"]
fn a_kernel_that_fails_while_it_runs_is_reported_as_such() {
    if std::env::var_os("MINISGL_TEST_WILD_KERNEL").is_none() {
        let itself = std::env::current_exe().unwrap();
        let name = "a_kernel_that_fails_while_it_runs_is_reported_as_such";
        let status = std::process::Command::new(itself)
            .args(["--ignored", "--exact", name])
            .env("MINISGL_TEST_WILD_KERNEL", "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let mut cuda = cuda();
    let kernel = cuda.modules().kernel("embed", "begin_step", 0).unwrap();
    // SAFETY: the batch lies at address 8, where nothing is: the device stops the kernel, which is what is tested.
    unsafe { cuda.launcher().launch_raw(&kernel, Grid::new(1, 32), [&8u64, &0u32, &8u64, &8u64, &8u64]) }
        .unwrap();
    let error = cuda.synchronize().unwrap_err();
    assert!(
        matches!(&error, CudaError::Kernel { launched, .. } if launched.contains("begin_step")),
        "{error:?}"
    );
}

#[test]
#[ignore = "needs a GPU and its management library"]
fn the_gpus_state_is_told_to_another_thread_while_this_one_has_the_context() {
    let mut cuda = cuda();
    let buffer = cuda.alloc(Purpose::Scratch, Element::Word, 1 << 20).unwrap();
    let telemetry = cuda.telemetry().expect("libnvidia-ml");
    assert!(!telemetry.driver.is_empty());
    let highest = telemetry.sm_mhz_max;
    let asked = std::thread::spawn(move || (0..10).map(|_| telemetry.read()).collect::<Option<Vec<_>>>());
    (0..10).for_each(|_| drop(words(&mut cuda, buffer)));
    for state in asked.join().unwrap().expect("an answer each time") {
        assert!((1..=highest).contains(&state.sm_mhz) && state.memory_mhz > 0, "{state:?}");
        assert!(state.power_w > 0.0 && (1..120).contains(&state.temperature_c), "{state:?}");
    }
}
