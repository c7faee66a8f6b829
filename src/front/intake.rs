//! What is ready to run and in no engine yet: one queue, of which every engine takes its share.
//!
//! ```text
//!   encoders, submitters ──> the sessions' turns ──┬── take ──> engine 0
//!                                                  ├── take ──> engine 1
//!                                                  └── …
//! ```
//!
//! A request counts for as many as it has samples, which go to one engine together.
//!
//! An engine takes the next request while it runs less than its share: all that run and wait, over all engines. So who
//! has come to an end takes the next one, and a few requests are spread rather than heaped on who came first. Of what waits
//! it takes first what begins like a prompt that it took before, for its prefix cache has the pages; what begins like a prompt
//! of another engine's it leaves to that one, unless that has its share. Else it takes what leaves all with as much work for each
//! request: who has more than others, lighter ones first, and who has less, heavier ones. For as many requests end on each, and the
//! last to be done is how long all take.
//!
//! Invariant: no engine sleeps while a request waits that it would take: who pushes wakes those that sleep, and so does an
//! engine that leaves requests because it has its share.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use minisgl_core::stats::Load;

use super::fair::{FairQueue, Waiting};
use super::locked;
use super::ready::Ready;

/// Prompts that begin with the same so many tokens go to one engine if they can.
const COMMON_TOKENS: usize = 64;
/// Prompts that are remembered by their beginnings; then all are forgotten.
const HOMES_MAX: usize = 1 << 16;
/// How many of those that wait are looked at for one that an engine may take: it is done under the lock of all engines. Nor does a
/// request's weight let it overtake more.
const WINDOW: usize = 64;

/// See the module.
pub struct Intake {
    /// Tokens that a sequence may have.
    sequence: u32,
    state: Mutex<State>,
}

struct State {
    waiting: FairQueue<Prompt>,
    engines: Vec<Engine>,
    /// The engine that took a prompt, by how that begins.
    homes: HashMap<u64, usize>,
    /// Requests that have come.
    come: u64,
}

/// A request that waits.
struct Prompt {
    ready: Ready,
    /// The hash of how it begins, if there are several engines and it is long enough for that to be worth anything.
    beginning: Option<u64>,
    /// Which one it is of all that have come.
    place: u64,
    work: u64,
}

impl Waiting for Prompt {
    fn session(&self) -> u64 {
        self.ready.session()
    }

    fn count(&self) -> usize {
        self.ready.count()
    }

    fn work(&self) -> u64 {
        self.work
    }
}

/// What an engine runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Running {
    /// Samples.
    pub count: usize,
    /// Their [`Waiting::work`] when they came.
    pub work: u64,
}

/// An engine as the intake knows it.
struct Engine {
    /// Requests that it takes at once.
    depth: usize,
    running: Running,
    load: Load,
    asleep: bool,
    /// It takes none any more.
    stopped: bool,
}

/// Requests that no engine will run. Dropping them tells their readers, which takes other locks.
pub struct Unrun(#[expect(dead_code, reason = "it is there to be dropped")] Box<FairQueue<Prompt>>);

/// Engines that sleep, and are to be woken now that the intake is not locked.
pub type Sleepers = Vec<usize>;

impl Intake {
    /// For engines that take so many requests at once, of sequences of so many tokens.
    pub fn new(depths: impl IntoIterator<Item = usize>, sequence: u32) -> Self {
        let engine = |depth| Engine {
            depth,
            running: Running::default(),
            load: Load::default(),
            asleep: false,
            stopped: false,
        };
        let engines = depths.into_iter().map(engine).collect();
        let state = State { waiting: FairQueue::new(), engines, homes: HashMap::new(), come: 0 };
        Intake { sequence, state: Mutex::new(state) }
    }

    /// How much work a request is.
    pub fn work(&self, ready: &Ready) -> u64 {
        ready.work(self.sequence)
    }

    /// Appends requests, together; gives them back if no engine takes any more.
    pub fn push(&self, ready: Vec<Ready>) -> Result<Sleepers, Vec<Ready>> {
        let mut state = locked(&self.state);
        if state.working() == 0 {
            return Err(ready);
        }
        for ready in ready {
            let work = self.work(&ready);
            let prompt = state.prompt(ready, work);
            state.waiting.push(prompt);
        }
        Ok(state.sleepers())
    }

    /// The next request of an engine that runs this.
    pub fn take(&self, engine: usize, running: Running) -> Option<Ready> {
        let mut state = locked(&self.state);
        state.engines[engine].running = running;
        let State { waiting, engines, homes, .. } = &mut *state;
        let share = Share::of(waiting.len(), engines);
        if !share.allows(&engines[engine]) {
            return None;
        }
        let home = |prompt: &Prompt| homes.get(prompt.beginning.as_ref()?).copied();
        let Prompt { ready, beginning, work: its_work, .. } = match engines.len() {
            1 => waiting.pop(),
            _ => {
                let weight = Weight::wanted(engine, waiting, engines);
                let is_left = |prompt: &Prompt| !share.is_kept(home(prompt), engines);
                waiting
                    .pop_where(WINDOW, |prompt| home(prompt) == Some(engine))
                    .or_else(|| waiting.pop_where(WINDOW, |prompt| is_left(prompt) && weight.is_of(prompt)))
                    .or_else(|| waiting.pop_where(WINDOW, is_left))
            }
        }?;
        let Running { count, work } = &mut engines[engine].running;
        (*count, *work) = (*count + ready.count(), *work + its_work);
        if let Some(beginning) = beginning {
            if homes.len() >= HOMES_MAX {
                homes.clear();
            }
            homes.insert(beginning, engine);
        }
        Some(ready)
    }

    /// Takes back what an engine has no room for; it comes next, or is dropped if no engine takes any more.
    pub fn give_back(&self, engine: usize, ready: Ready) {
        let mut state = locked(&self.state);
        if state.working() == 0 {
            drop(state);
            return drop(ready); // Which tells its reader.
        }
        let its_work = self.work(&ready);
        let Running { count, work } = &mut state.engines[engine].running;
        (*count, *work) = (*count - ready.count(), *work - its_work);
        let next = state.waiting.next().map(|prompt| prompt.place);
        let prompt = state.prompt(ready, its_work);
        let place = next.unwrap_or(prompt.place);
        state.waiting.give_back(Prompt { place, ..prompt });
    }

    /// Who sleeps although requests wait, for an engine has taken all that it may.
    pub fn left_by(&self) -> Sleepers {
        let mut state = locked(&self.state);
        if state.waiting.is_empty() { Sleepers::new() } else { state.sleepers() }
    }

    /// May an engine that runs nothing sleep? If so it counts as asleep until it is woken.
    pub fn may_sleep(&self, engine: usize) -> bool {
        let mut state = locked(&self.state);
        (state.engines[engine].running, state.engines[engine].load) = (Running::default(), Load::default());
        let State { waiting, engines, homes, .. } = &*state;
        let share = Share::of(waiting.len(), engines);
        let home =
            |prompt: &Prompt| homes.get(prompt.beginning.as_ref()?).copied().filter(|home| *home != engine);
        let takes = waiting.any(WINDOW, |prompt| !share.is_kept(home(prompt), engines));
        state.engines[engine].asleep = !takes;
        !takes
    }

    /// Takes out those of a session that `unwanted` picks.
    pub fn remove(&self, session: u64, mut unwanted: impl FnMut(&Ready) -> bool) -> Vec<Ready> {
        let removed = locked(&self.state).waiting.remove(session, |prompt| unwanted(&prompt.ready));
        removed.into_iter().map(|prompt| prompt.ready).collect()
    }

    /// How many wait for each engine.
    pub fn backlog(&self) -> u32 {
        let state = locked(&self.state);
        state.waiting.len().div_ceil(state.working().max(1)) as u32
    }

    /// What all engines together have on their hands, as far as they have told, once one has this.
    pub fn load(&self, engine: usize, load: Load) -> Load {
        let mut state = locked(&self.state);
        state.engines[engine].load = load;
        let waiting = Load { waiting: state.waiting.len() as u32, ..Load::default() };
        state.engines.iter().fold(waiting, |sum, engine| sum + engine.load)
    }

    /// Does an engine still take requests?
    pub fn is_working(&self, engine: usize) -> bool {
        !locked(&self.state).engines[engine].stopped
    }

    /// An engine takes no request any more. Gives who is to be woken, or what waits if it was the last one.
    pub fn stop(&self, engine: usize) -> Result<Sleepers, Unrun> {
        let mut state = locked(&self.state);
        let stopped = &mut state.engines[engine];
        (stopped.stopped, stopped.running, stopped.load) = (true, Running::default(), Load::default());
        state.homes.retain(|_, home| *home != engine);
        match state.working() {
            0 => Err(Unrun(Box::new(std::mem::replace(&mut state.waiting, FairQueue::new())))),
            _ => Ok(state.sleepers()),
        }
    }

    /// No engine takes any request any more; gives what waits.
    pub fn close(&self) -> Unrun {
        let mut state = locked(&self.state);
        state.engines.iter_mut().for_each(|engine| engine.stopped = true);
        Unrun(Box::new(std::mem::replace(&mut state.waiting, FairQueue::new())))
    }
}

impl State {
    fn prompt(&mut self, ready: Ready, work: u64) -> Prompt {
        let beginning = ready.prompt.get(..COMMON_TOKENS).filter(|_| self.engines.len() > 1);
        let hash = |tokens: &[u32]| {
            let mut hasher = DefaultHasher::new();
            tokens.hash(&mut hasher);
            hasher.finish()
        };
        self.come += 1;
        Prompt { beginning: beginning.map(hash), place: self.come, work, ready }
    }

    fn working(&self) -> usize {
        self.engines.iter().filter(|engine| !engine.stopped).count()
    }

    fn sleepers(&mut self) -> Sleepers {
        let asleep = |engine: &mut Engine| std::mem::take(&mut engine.asleep) && !engine.stopped;
        (0..self.engines.len()).filter(|index| asleep(&mut self.engines[*index])).collect()
    }
}

/// How many requests each engine may run now.
struct Share(usize);

impl Share {
    fn of(waiting: usize, engines: &[Engine]) -> Self {
        let working = || engines.iter().filter(|engine| !engine.stopped);
        let running: usize = working().map(|engine| engine.running.count).sum();
        Share((waiting + running).div_ceil(working().count().max(1)))
    }

    /// May an engine take one more?
    fn allows(&self, engine: &Engine) -> bool {
        engine.running.count < self.0.min(engine.depth)
    }

    /// Is a request left to this engine?
    fn is_kept(&self, home: Option<usize>, engines: &[Engine]) -> bool {
        home.is_some_and(|home| self.allows(&engines[home]))
    }
}

/// Which requests an engine takes, so that all come to have as much work for each that they run.
struct Weight {
    /// Of whose turn it is: a session's weight makes no other one wait.
    session: Option<u64>,
    /// Those with at most, or more than, the mean work of all that run and wait.
    is_light: bool,
    mean: u64,
    /// And that came before this many.
    before: u64,
}

impl Weight {
    fn wanted(engine: usize, waiting: &FairQueue<Prompt>, engines: &[Engine]) -> Self {
        let count: usize = engines.iter().map(|engine| engine.running.count).sum();
        let work: u64 = engines.iter().map(|engine| engine.running.work).sum();
        let mean = (work + waiting.work()) / (count + waiting.len()).max(1) as u64;
        let Running { count, work } = engines[engine].running;
        let next = waiting.next();
        let before = next.map_or(0, |prompt| prompt.place) + WINDOW as u64;
        Weight { session: next.map(Prompt::session), is_light: work > mean * count as u64, mean, before }
    }

    fn is_of(&self, prompt: &Prompt) -> bool {
        let mean = self.mean * prompt.count() as u64;
        let is_near = self.session == Some(prompt.session()) && prompt.place < self.before;
        is_near && (prompt.work() <= mean) == self.is_light
    }
}
