//! What ranks on GPUs, each a thread with a device of its own, pass to each other: inboxes, which the others' kernels write to.
//!
//! ```text
//!   rank 0's memory   inbox <── kernels of rank 1 push        host   ended: 0, or who did not come; kernels that wait read it,
//!   rank 1's memory   inbox <── kernels of rank 0 push               and every rank's host when it waits for a step
//! ```
//!
//! All ranks are of one process, so that an address means the same on all devices once they reach each other's memory. How words come
//! and go is `kernels/cuda/exchange/exchange.cuh`'s affair; which exchange has which part of an inbox, `ops/exchange/inbox.rs`'s. Of devices that
//! don't reach each other's memory NCCL fills the inboxes (`nccl.rs`).
//!
//! Invariant: an inbox lives until the last of the ranks has gone, each of which waits for its device before it goes. So whatever
//! a rank still pushes has a place.

mod carriers;
mod word;

use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::result;
use cudarc::driver::sys::CUstream;
use minisgl_core::backend::{DeviceInfo, Memory, Purpose};
use minisgl_core::shard::{RANKS_MAX, Rank};

use self::carriers::Carriers;
pub(crate) use self::word::ENDED;
use self::word::HostWord;
use crate::context::{Context, KernelSet};
use crate::error::{CudaError, Named, is_out_of_memory};
use crate::info::info_of;
use crate::memory::Address;
use crate::nccl::Comm;
use crate::turns;

/// A rank's end of what connects it to the others.
#[derive(Clone, Debug)]
pub struct Link {
    rank: Rank,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    /// Above the contexts, which it must not outlive.
    ended: HostWord,
    /// `[ranks]`.
    contexts: Vec<Arc<Context>>,
    /// `[ranks]`, each once its rank has planned its memory.
    inboxes: Vec<OnceLock<Inbox>>,
    /// How long a kernel waits for another rank's.
    patience: Duration,
    /// Where devices don't reach each other's memory.
    carriers: Option<Carriers>,
    meeting: Mutex<Meeting>,
    met: Condvar,
}

/// Where the ranks' hosts wait for each other.
#[derive(Debug, Default)]
struct Meeting {
    /// Ranks that have come.
    came: usize,
    /// How often all have.
    times: u64,
}

/// Memory that other ranks write to.
#[derive(Clone, Copy, Debug)]
struct Inbox {
    address: Address,
    bytes: usize,
}

/// What every byte of an inbox is when nothing has come; `EMPTY` in `exchange.cuh`.
pub(crate) const EMPTY_BYTE: u8 = 0xff;
/// How often a host that waits for others' looks whether exchanges have ended.
const LOOK: Duration = Duration::from_millis(10);
/// How many times as long as a kernel's is a host's patience, where NCCL's kernels have none: two steps may be under way. And how often
/// it looks.
const STEPS_PATIENCE: u32 = 4;
const GLANCE: Duration = Duration::from_micros(20);
impl Link {
    /// The ends of ranks on these devices, whose kernels wait for each other so long at most.
    ///
    /// # Errors
    /// A device that is not there, or one that does not reach another's memory where there is no NCCL.
    pub fn group(devices: &[usize], kernels: KernelSet, patience: Duration) -> Result<Vec<Link>, CudaError> {
        let open = |device: &usize| Context::open(*device, kernels);
        let contexts = devices.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let mut apart = None;
        for context in &contexts {
            context.make_current()?;
            for peer in &contexts {
                if !context.reach(peer)? {
                    apart = Some([context.number(), peer.number()]);
                }
            }
        }
        let carriers = apart.map(|[from, to]| {
            Carriers::new(&contexts).map_err(|error| match error {
                CudaError::NoNccl { reason } => CudaError::NoPeerAccess { from, to, reason },
                other => other,
            })
        });
        let carriers = carriers.transpose()?;
        let (ended, inboxes) = (HostWord::new()?, contexts.iter().map(|_| OnceLock::new()).collect());
        let count = contexts.len() as u32;
        let (meeting, met) = Default::default();
        let group = Arc::new(Group { contexts, inboxes, ended, patience, carriers, meeting, met });
        Ok((0..count).map(|index| Link { rank: Rank { index, count }, group: group.clone() }).collect())
    }

    /// Ends of NCCL's for ranks of which no two share a device: what benchmarks compare ours with.
    ///
    /// # Errors
    /// There is no such library; its own.
    pub fn comms(links: &[Link]) -> Result<Vec<Comm>, CudaError> {
        Comm::group(&links.iter().map(|link| link.context().clone()).collect::<Vec<_>>())
    }

    /// Whose end it is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The rank's device, as people name it.
    pub fn info(&self) -> DeviceInfo {
        info_of(&self.context().properties)
    }

    /// Memory free on the rank's device, whose context becomes the calling thread's.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn memory(&self) -> Result<Memory, CudaError> {
        self.context().make_current()?;
        let (free, total) = result::mem_get_info().named("reading the free GPU memory")?;
        Ok(Memory { free: free as u64, total: total as u64 })
    }

    /// How many ranks, this one too, share its device: one, but for tests.
    pub(crate) fn ranks_of_device(&self) -> u32 {
        let has = |context: &&Arc<Context>| context.is_of_device(self.context());
        self.group.contexts.iter().filter(has).count() as u32
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.group.contexts[self.rank.index as usize]
    }

    /// Ends all exchanges, those under way and later ones, from any thread: kernels that wait end, and who waits for them has an
    /// error.
    pub fn aborter(&self) -> impl Fn() + Send + Sync + 'static {
        let group = self.group.clone();
        move || group.end()
    }

    /// Lets ranks whose exchanges were ended meet again, when none of them enqueues anything. Where a device fails, it stays as it is.
    pub fn renewer(&self) -> impl Fn() + Send + Sync + 'static {
        let group = self.group.clone();
        move || {
            if group.renew().is_ok() {
                group.ended.store(0);
            }
        }
    }

    /// Waits until every rank has called it. For who would allocate or record, which may wait for a device's kernels, while these wait
    /// for another rank's.
    ///
    /// # Errors
    /// Exchanges have ended, as they do where a rank that fails calls [`Link::aborter`]'s function.
    pub fn meet(&self) -> Result<(), CudaError> {
        let Group { meeting, met, contexts, .. } = &*self.group;
        let mut state = meeting.lock().unwrap_or_else(PoisonError::into_inner);
        let times = state.times;
        state.came += 1;
        if state.came == contexts.len() {
            *state = Meeting { came: 0, times: times + 1 };
            met.notify_all();
        }
        while state.times == times {
            self.check().inspect_err(|_| state.came -= 1)?;
            state = met.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Allocates the rank's inbox, of so many bytes, all empty; the others find it from then on.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<(), CudaError> {
        let _turn = turns::synchronize();
        // SAFETY: the context is current; the memory is freed once, with the group.
        let allocated = unsafe { result::malloc_sync(bytes) };
        let address = allocated.map_err(|error| match is_out_of_memory(error) {
            true => {
                let free = self.memory().map_or(0, |memory| memory.free);
                CudaError::OutOfMemory { purpose: Purpose::Scratch, needed: bytes as u64, free }
            }
            false => CudaError::named("allocating GPU memory", error),
        })?;
        let inbox = Inbox { address: Address(address), bytes };
        let known = inbox.empty().and_then(|()| {
            let taken = self.group.inboxes[self.rank.index as usize].set(inbox);
            taken.map_err(|_| CudaError::Unsupported("a rank plans its memory once".into()))
        });
        if known.is_err() {
            // SAFETY: allocated above, and known to nobody.
            unsafe { result::memory_free(address) }.named("freeing GPU memory")?;
        }
        known
    }

    /// Every rank's inbox.
    pub(crate) fn inboxes(&self) -> Result<[Address; RANKS_MAX as usize], CudaError> {
        let mut addresses = [Address::NULL; RANKS_MAX as usize];
        for (address, inbox) in addresses.iter_mut().zip(&self.group.inboxes) {
            *address = inbox.get().ok_or(CudaError::NotReserved)?.address;
        }
        Ok(addresses)
    }

    /// Where kernels read whether they are to wait any longer.
    pub(crate) fn ended(&self) -> Address {
        self.group.ended.address()
    }

    /// Does NCCL fill inboxes, by [`Link::carry`]?
    pub(crate) fn is_carried(&self) -> bool {
        self.group.carriers.is_some()
    }

    /// Enqueues that an inbox gets so many bytes of every rank, in their order, those at `from` of this one. All ranks must do it.
    pub(crate) fn carry(
        &self,
        stream: CUstream,
        from: Address,
        to: Address,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let carriers = self.group.carriers.as_ref().ok_or(CudaError::NotReserved)?;
        carriers.carry(self.rank.index, stream, [from, to], bytes)
    }

    /// Waits on the host until `has_come`, where what carries words gives up nothing by itself; in vain for so long at most.
    pub(crate) fn wait_for(&self, has_come: impl Fn() -> bool) -> Result<(), CudaError> {
        let patience = self.group.patience * STEPS_PATIENCE;
        let until = Instant::now() + patience;
        while !has_come() {
            self.check()?;
            if Instant::now() > until {
                self.group.end();
                return Err(CudaError::RanksLate { seconds: patience.as_secs_f32() });
            }
            thread::sleep(GLANCE);
        }
        Ok(())
    }

    /// How long they wait.
    pub(crate) fn patience_ms(&self) -> u32 {
        self.group.patience.as_millis().min(u128::from(u32::MAX)) as u32
    }

    /// Has an exchange been given up? Asked when what was enqueued has ended.
    pub(crate) fn check(&self) -> Result<(), CudaError> {
        let seconds = self.group.patience.as_secs_f32();
        match self.group.ended.load() {
            0 => Ok(()),
            ENDED => Err(CudaError::RanksEnded),
            late => Err(CudaError::RankLate { rank: late - ENDED - 1, seconds }),
        }
    }
}

impl Group {
    /// Ends all exchanges: who ended them first is kept.
    fn end(&self) {
        self.ended.end();
        self.carriers.iter().for_each(Carriers::abort);
    }

    /// Empties all inboxes once all devices are idle.
    fn renew(&self) -> Result<(), CudaError> {
        for context in &self.contexts {
            context.make_current()?;
            result::ctx::synchronize().named("waiting for the GPU")?;
        }
        for (context, inbox) in self.contexts.iter().zip(&self.inboxes) {
            context.make_current()?;
            inbox.get().map_or(Ok(()), Inbox::empty)?;
        }
        self.carriers.as_ref().map_or(Ok(()), |carriers| carriers.renew(&self.contexts))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // NCCL's ends want their contexts.
        self.carriers = None;
        let _turn = turns::synchronize();
        // Errors have nobody to go to here.
        for (context, inbox) in self.contexts.iter().zip(&self.inboxes) {
            if let (Some(inbox), Ok(())) = (inbox.get(), context.make_current()) {
                // SAFETY: allocated once, freed once; no rank is left that could use it.
                let _ = unsafe { result::memory_free(inbox.address.0) };
            }
        }
        // The word goes next, and wants a context.
        let _ = self.contexts.first().map(|context| context.make_current());
    }
}

impl Inbox {
    /// Waits until it is empty. Its context is current.
    fn empty(&self) -> Result<(), CudaError> {
        // SAFETY: the range is one allocation's.
        let emptied = unsafe { result::memset_d8_sync(self.address.0, EMPTY_BYTE, self.bytes) };
        emptied.and_then(|()| result::ctx::synchronize()).named("emptying an inbox")
    }
}
