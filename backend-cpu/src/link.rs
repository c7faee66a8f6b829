//! What ranks on the CPU, each a thread with a device of its own, pass to each other.
//!
//! ```text
//!   rank 0   post ──┐                    ┌── adds what lies at 0 and at 1, in the tree's order
//!   rank 1   post ──┴── all are there ───┴── the same
//!            side 0 │                       side 1 at the next exchange, side 0 at the one after it
//! ```
//!
//! An exchange: each rank copies its numbers to its place, waits for the others, and reads all places. Sums are added in the order
//! of [`minisgl_core::shard`]'s tree by every rank alike, so all have the same bits, and those that one rank alone would have.
//!
//! Invariant: places of a side are written only by who has come past the exchange before, hence when nobody reads them any more.
//! So one meeting an exchange does. All ranks come to the same exchanges in the same order, for what a step does is a function of
//! its batch.
//!
//! Nobody waits for ever: a rank that does not come in time, or that is given up ([`Link::aborter`]), is the error of all others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use minisgl_core::shard::{RANKS_MAX, Rank};

use crate::error::CpuError;

/// A rank's end of what connects it to the others.
pub struct Link {
    rank: Rank,
    group: Arc<Group>,
    /// Which of the two the next exchange takes.
    side: usize,
}

struct Group {
    ranks: u32,
    /// How long a rank is waited for.
    patience: Duration,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// `[2][ranks]`: what each posts.
    sides: [Vec<RwLock<Vec<f32>>>; 2],
}

#[derive(Default)]
struct Meeting {
    /// Exchanges that all have come to.
    round: u64,
    /// Bit r: rank r has come to this one.
    here: u32,
    /// Why there will be no further one.
    ended: Option<Ended>,
}

#[derive(Clone)]
enum Ended {
    /// These ranks did not come.
    Late(String),
    Aborted,
}

/// What all ranks have posted.
struct Posted<'a>([Option<RwLockReadGuard<'a, Vec<f32>>>; RANKS_MAX as usize]);

impl Posted<'_> {
    fn of(&self, rank: usize) -> &[f32] {
        self.0[rank].as_ref().map_or(&[], |place| place)
    }
}

impl Link {
    /// The ends of so many ranks, who wait for each other so long at most.
    pub fn group(ranks: u32, patience: Duration) -> Vec<Link> {
        let side = || (0..ranks).map(|_| RwLock::default()).collect();
        let (meeting, changed) = (Mutex::default(), Condvar::new());
        let group = Arc::new(Group { ranks, patience, meeting, changed, sides: [side(), side()] });
        let end = |index| Link { rank: Rank { index, count: ranks }, group: group.clone(), side: 0 };
        (0..ranks).map(end).collect()
    }

    /// Whose end it is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Ends all exchanges, those under way and later ones, from any thread: who waits has an error.
    pub fn aborter(&self) -> impl Fn() + Send + Sync + 'static {
        let group = self.group.clone();
        move || {
            group.meeting().ended.get_or_insert(Ended::Aborted);
            group.changed.notify_all();
        }
    }

    /// Lets ranks whose exchanges were ended meet again, when none of them is in one.
    pub fn renewer(&self) -> impl Fn() + Send + Sync + 'static {
        let group = self.group.clone();
        // All have come past the same exchanges, so they are at the same side.
        move || {
            let mut meeting = group.meeting();
            (meeting.here, meeting.ended) = (0, None);
        }
    }

    /// Makes room for exchanges of so many numbers.
    pub fn reserve(&self, numbers: usize) {
        for side in &self.group.sides {
            let mut place = side[self.rank.index as usize].write().unwrap_or_else(PoisonError::into_inner);
            *place = vec![0.0; numbers];
        }
    }

    /// Every element becomes the sum of all ranks', added in pairs.
    pub fn sum(&mut self, x: &mut [f32]) -> Result<(), CpuError> {
        let ranks = self.rank.count as usize;
        let posted = self.post(x)?;
        let places: [&[f32]; RANKS_MAX as usize] = std::array::from_fn(|rank| posted.of(rank));
        for (i, x) in x.iter_mut().enumerate() {
            let mut sums = [0.0; RANKS_MAX as usize];
            sums.iter_mut().zip(&places[..ranks]).for_each(|(sum, place)| *sum = place[i]);
            let mut left = ranks;
            while left > 1 {
                left /= 2;
                (0..left).for_each(|pair| sums[pair] = sums[2 * pair] + sums[2 * pair + 1]);
            }
            *x = sums[0];
        }
        Ok(())
    }

    /// Every element becomes the largest of all ranks', NaN where one is.
    pub fn largest(&mut self, x: &mut [f32]) -> Result<(), CpuError> {
        let ranks = self.rank.count as usize;
        let posted = self.post(x)?;
        for (i, x) in x.iter_mut().enumerate() {
            let larger = |a: f32, b: f32| if a.is_nan() || a > b { a } else { b };
            *x = (0..ranks).map(|rank| posted.of(rank)[i]).fold(0.0, larger);
        }
        Ok(())
    }

    /// Every row, so many elements wide, becomes that of the rank which `owner` names.
    pub fn take_rows(
        &mut self,
        x: &mut [f32],
        width: usize,
        owner: impl Fn(usize) -> u32,
    ) -> Result<(), CpuError> {
        let posted = self.post(x)?;
        for (row, x) in x.chunks_mut(width).enumerate() {
            x.copy_from_slice(&posted.of(owner(row) as usize)[row * width..][..width]);
        }
        Ok(())
    }

    /// `out` is `[rows, cols]`, of which `share` is this rank's [share](Rank::share) of the columns.
    pub fn join_columns(&mut self, share: &[f32], cols: usize, out: &mut [f32]) -> Result<(), CpuError> {
        let count = self.rank.count;
        let posted = self.post(share)?;
        for index in 0..count {
            let range = Rank { index, count }.share(cols);
            let rows = posted.of(index as usize).chunks(range.len());
            for (out, row) in out.chunks_mut(cols).zip(rows) {
                out[range.clone()].copy_from_slice(row);
            }
        }
        Ok(())
    }

    /// Posts numbers, and waits until all have.
    fn post(&mut self, own: &[f32]) -> Result<Posted<'_>, CpuError> {
        let Link { rank, group, side } = self;
        let places = &group.sides[*side];
        {
            let mut place = places[rank.index as usize].write().unwrap_or_else(PoisonError::into_inner);
            let room = place.len();
            let Some(place) = place.get_mut(..own.len()) else {
                return Err(CpuError::Exchange { numbers: own.len(), room });
            };
            place.copy_from_slice(own);
        }
        group.meet(rank.index)?;
        *side = 1 - *side;
        let place =
            |rank: usize| places.get(rank).map(|place| place.read().unwrap_or_else(PoisonError::into_inner));
        Ok(Posted(std::array::from_fn(place)))
    }
}

impl Group {
    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all ranks have come here.
    fn meet(&self, rank: u32) -> Result<(), CpuError> {
        let mut meeting = self.meeting();
        self.check(&meeting)?;
        let round = meeting.round;
        meeting.here |= 1 << rank;
        if meeting.here.count_ones() == self.ranks {
            (meeting.here, meeting.round) = (0, round + 1);
            self.changed.notify_all();
        }
        let until = Instant::now() + self.patience;
        while meeting.round == round {
            self.check(&meeting)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = (0..self.ranks).filter(|rank| meeting.here >> rank & 1 == 0);
                let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                meeting.ended = Some(Ended::Late(missing.join(", ")));
                self.changed.notify_all();
            } else {
                let waited = self.changed.wait_timeout(meeting, left);
                meeting = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(())
    }

    /// Is there to be a further exchange?
    fn check(&self, meeting: &Meeting) -> Result<(), CpuError> {
        match &meeting.ended {
            None => Ok(()),
            Some(Ended::Aborted) => Err(CpuError::RanksEnded),
            Some(Ended::Late(ranks)) => {
                Err(CpuError::RankLate { ranks: ranks.clone(), seconds: self.patience.as_secs_f32() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// What each of several ranks makes of its link.
    fn each<R: Send>(ranks: u32, work: impl Fn(Link) -> R + Sync) -> Vec<R> {
        let links = Link::group(ranks, Duration::from_secs(20));
        thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = links.into_iter().map(|link| scope.spawn(move || work(link))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_added_in_pairs_and_all_ranks_have_the_same() {
        // 2^24 + 1 is no f32, so that another order gives another sum.
        const PARTS: [f32; 4] = [16_777_216.0, 1.0, 1.0, 1.0];
        let sums = each(4, |mut link| {
            link.reserve(3);
            let mut x = [PARTS[link.rank().index as usize]; 3];
            (0..100)
                .try_for_each(|_| {
                    x = [PARTS[link.rank().index as usize]; 3];
                    link.sum(&mut x)
                })
                .unwrap();
            x
        });
        assert_eq!(sums, [[(PARTS[0] + PARTS[1]) + (PARTS[2] + PARTS[3]); 3]; 4]);
        assert_ne!(sums[0][0], ((PARTS[0] + PARTS[1]) + PARTS[2]) + PARTS[3]);
    }

    #[test]
    fn rows_columns_and_magnitudes_are_those_of_their_owners() {
        let given = each(2, |mut link| {
            link.reserve(6);
            let me = link.rank().index as f32;
            let mut rows = [me, me, me + 10.0, me + 10.0];
            link.take_rows(&mut rows, 2, |row| 1 - row as u32).unwrap();
            let share = link.rank().share(5);
            let own: Vec<f32> =
                (0..2).flat_map(|row| share.clone().map(move |col| (row * 10 + col) as f32)).collect();
            let mut joined = [0.0; 10];
            link.join_columns(&own, 5, &mut joined).unwrap();
            let mut largest = [me, 1.0 - me, if me > 0.0 { f32::NAN } else { 9.0 }];
            link.largest(&mut largest).unwrap();
            (rows, joined, largest)
        });
        for (rows, joined, largest) in given {
            assert_eq!(rows, [1.0, 1.0, 10.0, 10.0]);
            assert_eq!(joined, [0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0, 14.0]);
            assert!(largest[..2] == [1.0, 1.0] && largest[2].is_nan());
        }
    }

    #[test]
    fn who_does_not_come_is_named_by_those_who_wait() {
        let mut links = Link::group(4, Duration::from_millis(30));
        links.iter().for_each(|link| link.reserve(1));
        let (absent, present) = links.split_at_mut(2);
        let errors: Vec<String> = thread::scope(|scope| {
            let threads: Vec<_> = present
                .iter_mut()
                .map(|link| scope.spawn(|| link.sum(&mut [1.0]).unwrap_err().to_string()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(errors.iter().all(|error| error.contains("0, 1")), "{errors:?}");
        assert!(absent[0].sum(&mut [1.0]).is_err(), "it is too late");
    }

    #[test]
    fn who_waits_is_told_that_the_others_have_ended() {
        let mut links = Link::group(2, Duration::from_secs(60));
        links.iter().for_each(|link| link.reserve(1));
        let abort = links[0].aborter();
        let second = &mut links[1];
        thread::scope(|scope| {
            let waits = scope.spawn(|| second.sum(&mut [1.0]));
            thread::sleep(Duration::from_millis(20));
            abort();
            assert!(matches!(waits.join().unwrap(), Err(CpuError::RanksEnded)));
        });
        assert!(matches!(links[0].sum(&mut [1.0]), Err(CpuError::RanksEnded)));
        // Until they may meet again.
        (links[0].renewer())();
        let (mut own, mut others) = ([1.0], [2.0]);
        let [first, second] = &mut links[..] else { panic!("there are two") };
        thread::scope(|scope| {
            scope.spawn(|| second.sum(&mut others).unwrap());
            first.sum(&mut own).unwrap();
        });
        assert_eq!([own, others], [[3.0]; 2]);
        assert!(matches!(links[0].sum(&mut [1.0; 2]), Err(CpuError::Exchange { numbers: 2, room: 1 })));
    }
}
