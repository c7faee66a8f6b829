//! Steps as the engine would pack them, for kernels that read the batch: rows with contexts of given lengths over pages
//! in no order.

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;
use minisgl_core::backend::{Device, Element, Purpose, Step};
use minisgl_core::batch::{HEADER_WORDS, Header, Layout, ROW_WORDS, Row, StepShape, TOKEN_WORDS, Token};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::rules::RULE_WORDS;
use minisgl_core::sampling::SlotState;
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::{Buffer, Cuda, CudaError};

/// Tokens of a page.
pub(crate) const PAGE_SIZE: u32 = 16;

/// A step being described.
pub(crate) struct StepOf {
    /// Rows that decode: the first ones, with one token each.
    pub(crate) decode_rows: u32,
    /// `(position of the first token, tokens)` of each row.
    pub(crate) rows: Vec<(u32, u32)>,
    /// Ids are drawn below this.
    pub(crate) vocab: u32,
    /// How every row draws.
    pub(crate) state: SlotState,
}

impl StepOf {
    /// A decode step of rows whose tokens attend to `contexts` tokens each.
    pub(crate) fn decode(contexts: &[u32], vocab: u32) -> StepOf {
        let rows = contexts.iter().map(|context| (context - 1, 1)).collect();
        let decode_rows = contexts.len() as u32;
        StepOf { decode_rows, rows, vocab, state: SlotState::default() }
    }

    /// A decode step's rows, and beside them so many tokens of a prompt behind a context.
    pub(crate) fn mixed(contexts: &[u32], tokens: u32, behind: u32, vocab: u32) -> StepOf {
        let mut step = StepOf::decode(contexts, vocab);
        step.rows.push((behind, tokens));
        step
    }

    /// Capacities that just hold the step.
    pub(crate) fn limits(&self) -> Limits {
        let ends = self.rows.iter().map(|(position, tokens)| position + tokens);
        Limits {
            running: self.rows.len() as u32,
            queued: 1,
            sequence: ends.clone().max().unwrap_or(1),
            prefill_tokens: self.tokens(),
            page_size: PAGE_SIZE,
            pages: ends.map(|end| end.div_ceil(PAGE_SIZE)).sum(),
            graph_rows: 0,
        }
    }

    pub(crate) fn tokens(&self) -> u32 {
        self.rows.iter().map(|(_, tokens)| tokens).sum()
    }

    /// The pages of each row, in no order.
    pub(crate) fn page_lists(&self) -> Vec<Vec<u32>> {
        let mut pages = shuffled(self.limits().pages).into_iter();
        let count = |(position, tokens): &(u32, u32)| (position + tokens).div_ceil(PAGE_SIZE) as usize;
        self.rows.iter().map(|row| pages.by_ref().take(count(row)).collect()).collect()
    }

    /// A token for each location of the pages.
    fn history(&self, pages: u32) -> Vec<u32> {
        let id = |location| (splitmix64(u64::from(location)) % u64::from(self.vocab)) as u32;
        (0..(pages + 1) * PAGE_SIZE).map(id).collect()
    }

    pub(crate) fn shape(&self) -> StepShape {
        let (rows, decode_rows) = (self.rows.len() as u32, self.decode_rows);
        StepShape { decode_rows, prefill_rows: rows - decode_rows, tokens: self.tokens(), samples: rows }
    }

    pub(crate) fn packed_rows(&self) -> Vec<Row> {
        let mut first_token = 0;
        let pack = |(slot, (position, tokens)): (usize, &(u32, u32))| {
            let row = Row {
                slot: slot as u32,
                first_token,
                tokens: *tokens,
                position: *position,
                kv_len: position + tokens,
                sampled: 1,
                ..Row::default()
            };
            first_token += tokens;
            row
        };
        self.rows.iter().enumerate().map(pack).collect()
    }

    /// Packs the step and puts it on the device. `plan` fills the plan words.
    pub(crate) fn upload(
        &self,
        cuda: &mut Cuda,
        plan_words: usize,
        plan: impl FnOnce(StepShape, &[Row], &mut [u32]),
    ) -> Result<Step<Buffer>, CudaError> {
        let limits = self.limits();
        let (layout, shape, rows) = (Layout::new(&limits, plan_words), self.shape(), self.packed_rows());
        let (width, slots) = (limits.table_width(), limits.running as usize + 1);
        let mut table = vec![limits.pages; slots * width as usize];
        let pages = self.page_lists();
        let mut words = vec![0u32; layout.words];
        let header =
            Header { rows: shape.rows(), tokens: shape.tokens, samples: shape.samples, ..Header::default() };
        words[..HEADER_WORDS].copy_from_slice(cast_slice(&[header]));
        plan(shape, &rows, &mut words[layout.plan..layout.rows]);
        words[layout.rows..][..rows.len() * ROW_WORDS].copy_from_slice(cast_slice(&rows));
        let tokens: &mut [Token] =
            cast_slice_mut(&mut words[layout.tokens..][..shape.tokens as usize * TOKEN_WORDS]);
        for row in &rows {
            let table = &mut table[(row.slot * width) as usize..][..width as usize];
            let own = &pages[row.slot as usize];
            table[..own.len()].copy_from_slice(own);
            for i in 0..row.tokens {
                let (index, position) = (row.first_token + i, row.position + i);
                let page = table[(position / PAGE_SIZE) as usize];
                tokens[index as usize] = Token {
                    id: (splitmix64(u64::from(index)) % u64::from(self.vocab)) as u32,
                    slot: row.slot,
                    position,
                    location: page * PAGE_SIZE + position % PAGE_SIZE,
                };
            }
        }
        Ok(Step {
            shape,
            batch: upload_words(cuda, &words)?,
            layout,
            page_table: upload_words(cuda, &table)?,
            table_width: width,
            page_size: PAGE_SIZE,
            token_pool: upload_words(cuda, &vec![0; slots])?,
            slots: upload_words(cuda, cast_slice(&vec![self.state; slots]))?,
            rules: cuda.alloc(Purpose::Scratch, Element::Word, slots * RULE_WORDS)?,
            history: upload_words(cuda, &self.history(limits.pages))?,
            masks: upload_words(cuda, &vec![u32::MAX; rows.len() * mask_words(self.vocab)])?,
        })
    }
}

/// The numbers below `count` in an order that looks like none.
fn shuffled(count: u32) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..count).collect();
    numbers.sort_by_key(|number| splitmix64(u64::from(*number)));
    numbers
}

/// Puts words on the device.
pub(crate) fn upload_words(cuda: &mut Cuda, words: &[u32]) -> Result<Buffer, CudaError> {
    let buffer = cuda.alloc(Purpose::Scratch, Element::Word, words.len())?;
    let mut staging = cuda.alloc_pinned(words.len())?;
    cuda.words_mut(&mut staging)?.copy_from_slice(words);
    cuda.upload(&mut staging, 0..words.len(), buffer)?;
    Ok(buffer)
}

/// Fetches the first words of a buffer.
pub(crate) fn download_words(cuda: &mut Cuda, from: Buffer, words: usize) -> Result<Vec<u32>, CudaError> {
    let mut staging = cuda.alloc_pinned(words)?;
    cuda.download(minisgl_core::backend::Queue::Compute, from, words, &mut staging)?;
    Ok(cuda.words(&staging)?.to_vec())
}

/// Fetches bf16 activations.
pub(crate) fn activations(cuda: &mut Cuda, from: Buffer, count: usize) -> Result<Vec<bf16>, CudaError> {
    Ok(bytemuck::cast_slice(&download_words(cuda, from, count / 2)?).to_vec())
}
