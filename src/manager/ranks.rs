//! One manager, several ranks: its decisions are broadcast, and what the ranks report is merged.
//!
//! Every rank of a tensor-parallel model holds its own heads of every block, at the same block and slot ids, so
//! one transfer of the manager is one copy on every rank that takes part. [`RankSet`] hands each rank the
//! transfers in the manager's order and answers the manager once the last rank has answered: *completed* is the
//! minimum over the ranks, *succeeded* only what succeeded on all of them. Steps settle by the same rule. There
//! is no collective: a rank only takes from its queue and reports.
//!
//! With fewer KV heads than ranks, consecutive ranks hold the same heads. They share one copy of it in the
//! lower tiers: the first of them, the *owner*, stores; all of them load.
//!
//! Like the manager it is a pure state machine: no threads, no I/O, no clock.

use std::collections::VecDeque;

use super::hash::CheapMap;
use super::transfer::{Direction, Transfer};
use super::{Outcome, TransferId};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "ranks";

/// Index of a rank.
pub type Rank = u32;

/// A transfer that has been broadcast and not been answered by all.
struct Broadcast {
    /// Ranks that have yet to answer, one bit each.
    waiting: u128,
    /// Ranks that have taken it.
    taken: u128,
    /// The worst so far.
    outcome: Outcome,
}

/// One rank's part.
#[derive(Default)]
struct Member {
    queue: VecDeque<Transfer>,
    /// Transfers taken from the queue and not answered.
    taken: u32,
    /// Steps that have finished.
    finished: u64,
    /// How often it has been lost: reports of an earlier life are dropped.
    epoch: u32,
    lost: bool,
}

/// The ranks behind one manager. See the module documentation.
pub struct RankSet {
    members: Vec<Member>,
    /// Ranks that hold the same heads.
    replicas: u32,
    flying: CheapMap<TransferId, Broadcast>,
}

/// What became of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Other ranks have yet to answer.
    Pending,
    /// It was the last one: this is to be given to [`super::Manager::complete`].
    Done(Outcome),
    /// It came from an earlier life of the rank and was dropped (R10).
    Stale,
}

impl RankSet {
    /// The most ranks of a set.
    pub const MAX_RANKS: u32 = u128::BITS;

    /// Ranks `0..num_ranks` over a model of `num_kv_heads` KV heads.
    ///
    /// # Errors
    /// `Unsupported` for no rank or more than [`Self::MAX_RANKS`]; `InvalidArgument` for heads that cannot be
    /// dealt evenly: neither number is a multiple of the other.
    pub fn new(num_ranks: u32, num_kv_heads: u32) -> Result<Self> {
        if num_ranks == 0 || num_ranks > Self::MAX_RANKS {
            let supported = format!("1 to {}", Self::MAX_RANKS);
            return Err(Error::unsupported(OP, "a number of ranks of", num_ranks, supported));
        }
        let even = |a: u32, b: u32| b > 0 && a.is_multiple_of(b);
        if num_kv_heads == 0 || !even(num_kv_heads, num_ranks) && !even(num_ranks, num_kv_heads) {
            return Err(Error::invalid(
                OP,
                format!(
                    "{num_kv_heads} KV heads cannot be dealt evenly to {num_ranks} ranks: one number is to \
                     be a multiple of the other"
                ),
            ));
        }
        Ok(Self {
            members: (0..num_ranks).map(|_| Member::default()).collect(),
            replicas: (num_ranks / num_kv_heads).max(1),
            flying: CheapMap::default(),
        })
    }

    /// The number of ranks.
    pub fn num_ranks(&self) -> u32 {
        self.members.len() as u32
    }

    /// The rank whose lower tiers hold the heads of `rank`: itself, unless they are replicated.
    pub fn owner(&self, rank: Rank) -> Rank {
        rank / self.replicas * self.replicas
    }

    /// Broadcasts a transfer of the manager to every rank that takes part in it: all of them for what is
    /// loaded, the owners for what is stored. Gives the outcome at once when it cannot succeed, because a
    /// rank that takes part is lost and no other one is to touch the memory.
    ///
    /// # Errors
    /// `InvalidArgument` for a transfer that is in flight already; nothing is changed.
    pub fn broadcast(&mut self, transfer: Transfer) -> Result<Report> {
        if self.flying.contains_key(&transfer.id) {
            return Err(Error::invalid(OP, format!("transfer {} is in flight", transfer.id)));
        }
        let all = transfer.path.direction() == Direction::Onboard;
        let takes_part = |rank: Rank| all || self.owner(rank) == rank;
        let part: Vec<Rank> = (0..self.num_ranks()).filter(|&rank| takes_part(rank)).collect();
        if part.iter().any(|&rank| self.members[rank as usize].lost) {
            return Ok(Report::Done(Outcome::Failed));
        }
        let mut waiting = 0;
        for rank in part {
            waiting |= 1 << rank;
            self.members[rank as usize].queue.push_back(transfer);
        }
        self.flying
            .insert(transfer.id, Broadcast { waiting, taken: 0, outcome: Outcome::Succeeded });
        Ok(Report::Pending)
    }

    /// The next transfer that `rank` is to start, in the manager's order; `None` when there is none, and for a
    /// rank that is lost or unknown.
    pub fn next(&mut self, rank: Rank) -> Option<Transfer> {
        let member = self.members.get_mut(rank as usize)?;
        let transfer = member.queue.pop_front()?;
        member.taken += 1;
        if let Some(flight) = self.flying.get_mut(&transfer.id) {
            flight.taken |= 1 << rank;
        }
        Some(transfer)
    }

    /// Takes a rank's answer to a transfer. `epoch` is that of [`Self::epoch`] when the rank took it.
    ///
    /// # Errors
    /// `UnknownRank`; `UnknownTransfer` for one that this rank has not taken or has answered already; nothing
    /// is changed.
    pub fn complete(
        &mut self,
        rank: Rank,
        epoch: u32,
        id: TransferId,
        outcome: Outcome,
    ) -> Result<Report> {
        let unknown = || Error::new(OP, ErrorKind::UnknownTransfer(id));
        let member = self.member(rank)?;
        if epoch != member.epoch || member.lost {
            return Ok(Report::Stale);
        }
        let bit = 1 << rank;
        let flight = self.flying.get_mut(&id).filter(|f| f.waiting & f.taken & bit != 0);
        let flight = flight.ok_or_else(unknown)?;
        flight.waiting &= !bit;
        flight.outcome = flight.outcome.max(outcome);
        let (last, outcome) = (flight.waiting == 0, flight.outcome);
        self.members[rank as usize].taken -= 1;
        if !last {
            return Ok(Report::Pending);
        }
        self.flying.remove(&id);
        Ok(Report::Done(outcome))
    }

    /// Says that the first `steps` steps have finished on `rank`. Gives how many have finished on every rank
    /// that is not lost: what [`super::Manager::advance`] may take as settled.
    ///
    /// # Errors
    /// `UnknownRank`; `InvalidArgument` for a number that goes back; nothing is changed.
    pub fn finished(&mut self, rank: Rank, epoch: u32, steps: u64) -> Result<u64> {
        let member = self.member(rank)?;
        if epoch == member.epoch && !member.lost {
            if steps < member.finished {
                return Err(Error::invalid(
                    OP,
                    format!("{steps} steps of rank {rank} go back from {}", member.finished),
                ));
            }
            self.members[rank as usize].finished = steps;
        }
        Ok(self.settled())
    }

    /// Steps that have finished on every rank that is not lost.
    pub fn settled(&self) -> u64 {
        let live = self.members.iter().filter(|member| !member.lost);
        live.map(|member| member.finished).min().unwrap_or(0)
    }

    /// Transfers that `rank` has yet to start and to answer: how far it has fallen behind. A caller that stops
    /// taking transfers from the manager while this is large bounds every queue.
    ///
    /// # Errors
    /// `UnknownRank`.
    pub fn behind(&self, rank: Rank) -> Result<usize> {
        let member = self.member(rank)?;
        Ok(member.queue.len() + member.taken as usize)
    }

    /// The life that `rank` is in.
    ///
    /// # Errors
    /// `UnknownRank`.
    pub fn epoch(&self, rank: Rank) -> Result<u32> {
        Ok(self.member(rank)?.epoch)
    }

    /// A rank is gone, and its memory with it: what it had yet to answer has failed. Appends to `done` the
    /// transfers for which it was the last; the others fail once the ranks that still work on their memory
    /// have answered. Until it is back, every transfer that it takes part in fails. Its part of every block
    /// is lost on all tiers that it held, so the manager's sequences are to be aborted and its caches reset.
    ///
    /// # Errors
    /// `UnknownRank`; nothing is changed.
    pub fn lose(&mut self, rank: Rank, done: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.member(rank)?;
        let member = &mut self.members[rank as usize];
        (member.lost, member.taken) = (true, 0);
        member.queue.clear();
        let bit = 1 << rank;
        let before = done.len();
        self.flying.retain(|&id, flight| {
            if flight.waiting & bit != 0 {
                flight.waiting &= !bit;
                flight.outcome = Outcome::Failed;
                if flight.waiting == 0 {
                    done.push((id, Outcome::Failed));
                }
            }
            flight.waiting != 0
        });
        done[before..].sort_unstable_by_key(|&(id, _)| id);
        Ok(())
    }

    /// A lost rank is back, with empty memory, and takes part from now on; `steps` have finished before it.
    /// Gives its new epoch.
    ///
    /// # Errors
    /// `UnknownRank`; `InvalidArgument` for a rank that is not lost; nothing is changed.
    pub fn rejoin(&mut self, rank: Rank, steps: u64) -> Result<u32> {
        if !self.member(rank)?.lost {
            return Err(Error::invalid(OP, format!("rank {rank} is not lost")));
        }
        let member = &mut self.members[rank as usize];
        *member = Member { epoch: member.epoch + 1, finished: steps, ..Member::default() };
        Ok(member.epoch)
    }

    fn member(&self, rank: Rank) -> Result<&Member> {
        let unknown = || Error::new(OP, ErrorKind::UnknownRank { rank, ranks: self.num_ranks() });
        self.members.get(rank as usize).ok_or_else(unknown)
    }
}
