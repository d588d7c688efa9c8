//! When stores may run: the part of the engine that decides, without a device and without a clock.
//!
//! Loads gate requests, so they go to the device as soon as they are submitted, and steps wait for them there.
//! Stores can wait: they queue on the host and start by *chunks*, of which few are in flight at a time, so that a
//! load never finds more than those before it. Beside loads, and when they slow the caller's steps down, stores
//! get a *share* of the time: a chunk that took `t` is followed by a pause of `t * (1 / share - 1)`, whatever the
//! speed of the link. Shares are never 0, so every store gets its turn.
//!
//! How much stores slow steps down is measured: steps with chunks in flight against what steps without would have
//! taken for the same work. Where the queue never runs dry, stores are held back now and then for a few steps to
//! compare with.

use super::OP;
use crate::error::{Error, Result};

/// How stores share the link and the device with loads and steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pacing {
    /// Bytes that are started together; a single block may be larger.
    pub chunk_bytes: u64,
    /// Bytes of stores in flight at most, or one chunk where that is more.
    pub in_flight_bytes: u64,
    /// Share of the time that stores get while loads are in flight, above 0 and up to 1.
    pub beside_loads: f64,
    /// By how much steps may take longer beside stores, as a fraction, before stores get less of the time.
    pub tolerated_slowdown: f64,
}

impl Default for Pacing {
    /// Chunks of 4 MiB (80 us of a PCIe 5 link), two of them in flight, a fifth of the time beside loads, 5 %.
    fn default() -> Self {
        Self {
            chunk_bytes: 4 << 20,
            in_flight_bytes: 8 << 20,
            beside_loads: 0.2,
            tolerated_slowdown: 0.05,
        }
    }
}

/// How long a step of the caller's took on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Milliseconds.
    pub ms: f64,
    /// What it had to do, in any unit that the time of steps of one kind grows with: bytes read, or tokens.
    pub work: f64,
}

impl Pacing {
    /// # Errors
    /// `InvalidArgument` for a chunk of no bytes, a share that is not above 0 and up to 1, a slowdown that is no
    /// number >= 0.
    pub(super) fn check(&self) -> Result<()> {
        let share = self.beside_loads > 0.0 && self.beside_loads <= 1.0;
        if self.chunk_bytes > 0 && share && self.tolerated_slowdown >= 0.0 {
            return Ok(());
        }
        Err(Error::invalid(
            OP,
            format!(
                "{self:?}: chunks have bytes, stores get a share above 0 and up to 1 beside loads, and the \
                 tolerated slowdown is 0 or more"
            ),
        ))
    }
}

/// What stores compete with at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Demand {
    /// Nothing.
    Idle,
    /// Loads are in flight.
    Loads,
    /// The caller waits for the stores: nothing holds them back but the cap.
    Urgent,
}

/// Nanoseconds of a clock that never goes back.
pub(super) type Nanos = u64;

/// Longest pause after a chunk.
const LONGEST_PAUSE: Nanos = 20_000_000;

pub(super) struct Schedule {
    pacing: Pacing,
    in_flight: u64,
    chunks: usize,
    /// When the last chunk ended, and how long it took.
    last: (Nanos, Nanos),
    throttle: Throttle,
}

impl Schedule {
    pub fn new(pacing: Pacing) -> Self {
        Self { pacing, in_flight: 0, chunks: 0, last: (0, 0), throttle: Throttle::new() }
    }

    pub fn pacing(&self) -> &Pacing {
        &self.pacing
    }

    pub fn set_pacing(&mut self, pacing: Pacing) {
        self.pacing = pacing;
    }

    /// Whether a chunk of so many bytes may start now.
    pub fn may_start(&self, bytes: u64, demand: Demand, now: Nanos) -> bool {
        let room =
            self.chunks == 0 || self.in_flight.saturating_add(bytes) <= self.pacing.in_flight_bytes;
        let share = match demand {
            Demand::Urgent => return room,
            Demand::Loads => self.throttle.share.min(self.pacing.beside_loads),
            Demand::Idle => self.throttle.share,
        };
        if self.throttle.holds(now) {
            return false;
        }
        if share >= 1.0 {
            return room;
        }
        let (ended, took) = self.last;
        let pause = ((took as f64 * (1.0 / share - 1.0)) as Nanos).min(LONGEST_PAUSE);
        self.chunks == 0 && now >= ended.saturating_add(pause)
    }

    /// A chunk was started.
    pub fn started(&mut self, bytes: u64) {
        self.chunks += 1;
        self.in_flight = self.in_flight.saturating_add(bytes);
        self.throttle.stored = true;
    }

    /// A chunk has ended; it took so long.
    pub fn ended(&mut self, bytes: u64, took: Nanos, now: Nanos) {
        self.chunks = self.chunks.saturating_sub(1);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.last = (now, took);
    }

    /// A step has ended. `queued` says whether there are stores to hold back.
    pub fn step(&mut self, step: StepTime, queued: bool, now: Nanos) {
        let stored = self.chunks > 0;
        self.throttle.step(step, stored, queued, self.pacing.tolerated_slowdown, now);
    }

    /// Share of the time that stores get beside steps.
    pub fn share(&self) -> f64 {
        self.throttle.share
    }
}

/// Steps beside stores that are judged together.
const WINDOW: u32 = 8;
/// Steps beside stores after which stores are held back to measure steps without them.
const PROBE_AFTER: u32 = 64;
/// Steps without stores that such a measurement takes.
const QUIET_STEPS: u32 = 4;
/// Stores are not held back longer than this, whether steps are reported or not.
const LONGEST_HOLD: Nanos = 200_000_000;
const LEAST_SHARE: f64 = 1.0 / 32.0;
/// What a share grows by while steps are hardly slowed down.
const GROWTH: f64 = 1.25;

/// Finds the share of the time at which stores slow steps down by no more than is tolerated.
struct Throttle {
    share: f64,
    /// Steps without stores.
    quiet: Fit,
    /// Milliseconds of the steps beside stores since the last judgement, what they would have taken without, and
    /// how many.
    busy: (f64, f64, u32),
    /// Whether a chunk was in flight since the last step was reported.
    stored: bool,
    /// Steps beside stores since the last quiet ones.
    since_quiet: u32,
    /// Until when stores are held back, and how many quiet steps that is for.
    held: Option<(Nanos, u32)>,
}

impl Throttle {
    fn new() -> Self {
        Self {
            share: 1.0,
            quiet: Fit::default(),
            busy: (0.0, 0.0, 0),
            stored: false,
            // Nothing is known: the first steps beside stores lead to a comparison.
            since_quiet: PROBE_AFTER - WINDOW,
            held: None,
        }
    }

    fn holds(&self, now: Nanos) -> bool {
        self.held.is_some_and(|(until, _)| now < until)
    }

    fn step(&mut self, step: StepTime, in_flight: bool, queued: bool, tolerated: f64, now: Nanos) {
        let stored = std::mem::replace(&mut self.stored, in_flight);
        self.held = self.held.filter(|&(until, _)| now < until);
        if !(step.ms.is_finite() && step.ms > 0.0 && step.work.is_finite() && step.work >= 0.0) {
            return;
        }
        if !stored {
            self.quiet.add(step);
            self.since_quiet = 0;
            self.held = self.held.and_then(|(until, left)| Some((until, left.checked_sub(1)?)));
            return;
        }
        self.since_quiet += 1;
        if self.since_quiet >= PROBE_AFTER && queued && self.held.is_none() {
            self.held = Some((now.saturating_add(LONGEST_HOLD), QUIET_STEPS - 1));
            self.since_quiet = 0;
        }
        let Some(alone) = self.quiet.predict(step.work) else { return };
        self.busy = (self.busy.0 + step.ms, self.busy.1 + alone, self.busy.2 + 1);
        if self.busy.2 == WINDOW {
            let slowdown = self.busy.0 / self.busy.1 - 1.0;
            if slowdown > tolerated {
                self.share = (self.share / 2.0).max(LEAST_SHARE);
            } else if slowdown < tolerated / 2.0 {
                self.share = (self.share * GROWTH).min(1.0);
            }
            self.busy = (0.0, 0.0, 0);
        }
    }
}

/// What older steps weigh when one more is added.
const MEMORY: f64 = 0.95;

/// Time as a linear function of work, by least squares over the newest steps.
#[derive(Default)]
struct Fit {
    /// Weights, and the weighted sums of work, time, work squared, and work times time.
    n: f64,
    w: f64,
    t: f64,
    ww: f64,
    wt: f64,
}

impl Fit {
    fn add(&mut self, StepTime { ms, work }: StepTime) {
        for (sum, term) in [
            (&mut self.n, 1.0),
            (&mut self.w, work),
            (&mut self.t, ms),
            (&mut self.ww, work * work),
            (&mut self.wt, work * ms),
        ] {
            *sum = MEMORY * *sum + term;
        }
    }

    /// The time of a step of so much work. Where all steps had the same, and where no line of a positive start and
    /// slope fits them, their mean.
    fn predict(&self, work: f64) -> Option<f64> {
        if self.n == 0.0 {
            return None;
        }
        let (mean_work, mean) = (self.w / self.n, self.t / self.n);
        let variance = self.ww / self.n - mean_work * mean_work;
        if variance <= 1e-6 * mean_work * mean_work {
            return Some(mean);
        }
        let slope = (self.wt / self.n - mean_work * mean) / variance;
        let start = mean - slope * mean_work;
        if slope < 0.0 {
            Some(mean)
        } else if start < 0.0 {
            Some(mean * work / mean_work)
        } else {
            Some(start + slope * work)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A link, steps and loads that come and go, in virtual time; the caller looks every `poll` nanoseconds.
    struct World {
        schedule: Schedule,
        now: Nanos,
        poll: Nanos,
        /// Bytes of the chunks that wait, and of those in flight with the moments of their start and end.
        queue: Vec<u64>,
        flying: Vec<(u64, Nanos, Nanos)>,
        ended: Vec<u64>,
        /// Nanoseconds that the lane was busy.
        busy: Nanos,
    }

    /// Nanoseconds that a chunk takes: 50 GB/s.
    fn takes(bytes: u64) -> Nanos {
        bytes / 50 + 1
    }

    impl World {
        fn new(pacing: Pacing, poll: Nanos, mut queue: Vec<u64>) -> Self {
            queue.reverse();
            let schedule = Schedule::new(pacing);
            Self { schedule, now: 0, poll, queue, flying: vec![], ended: vec![], busy: 0 }
        }

        fn look(&mut self, demand: Demand) {
            self.now += self.poll;
            while let Some(&(bytes, start, end)) = self.flying.first().filter(|f| f.2 <= self.now) {
                self.flying.remove(0);
                self.schedule.ended(bytes, end - start, self.now);
                self.ended.push(bytes);
            }
            while let Some(&bytes) = self.queue.last()
                && self.schedule.may_start(bytes, demand, self.now)
            {
                self.queue.pop();
                let start = self.flying.last().map_or(self.now, |f| f.2.max(self.now));
                self.flying.push((bytes, start, start + takes(bytes)));
                self.busy += takes(bytes);
                self.schedule.started(bytes);
            }
        }

        fn in_flight(&self) -> u64 {
            self.flying.iter().map(|f| f.0).sum()
        }
    }

    fn demand() -> impl Strategy<Value = Demand> {
        prop::sample::select(vec![Demand::Idle, Demand::Loads, Demand::Urgent])
    }

    proptest! {
        /// Never more in flight than the cap or one chunk; beside loads one chunk at a time is started, once the
        /// ones before the loads have ended; all chunks end, in their order, each once, whatever is demanded.
        #[test]
        fn stores_keep_the_cap_give_way_to_loads_and_all_end(
            chunks in prop::collection::vec(1u64..20_000_000, 1..40),
            demands in prop::collection::vec((demand(), 1usize..40), 1..20),
            poll in 1_000u64..3_000_000,
            cap in 0u64..40_000_000,
        ) {
            let pacing = Pacing { in_flight_bytes: cap, ..Pacing::default() };
            let mut world = World::new(pacing, poll, chunks.clone());
            for &(demand, looks) in demands.iter().cycle() {
                for _ in 0..looks {
                    let before = world.flying.len();
                    world.look(demand);
                    prop_assert!(world.in_flight() <= cap || world.flying.len() == 1);
                    if demand == Demand::Loads && world.flying.len() > 1 {
                        prop_assert!(world.flying.len() <= before, "started beside others");
                    }
                }
                if world.ended.len() == chunks.len() {
                    break;
                }
                // A pause is 20 ms at most, a chunk takes half a millisecond.
                prop_assert!(world.now < 40 * 25_000_000 + 10_000 * poll, "starved");
            }
            prop_assert_eq!(world.ended, chunks);
            prop_assert_eq!((world.schedule.in_flight, world.schedule.chunks), (0, 0));
        }

        /// While loads never end, stores get their share of the time and no more.
        #[test]
        fn beside_loads_stores_get_their_share(share in 0.05f64..1.0, poll in 500u64..5_000) {
            let pacing = Pacing { beside_loads: share, ..Pacing::default() };
            let mut world = World::new(pacing, poll, vec![4 << 20; 1000]);
            while world.now < 20_000_000 {
                world.look(Demand::Loads);
            }
            let got = world.busy as f64 / world.now as f64;
            // Ends are seen at the next look, up to `poll` late, twice per chunk of 84 us.
            prop_assert!(got < share + 0.02 && got > 0.85 * share - 0.02, "{got} of {share}");
        }
    }

    /// Runs steps of about 10 ms beside stores that never run dry and slow them down by `harm` while they run.
    /// The mean slowdown and the share of the last half of the steps.
    fn settle(harm: f64, noise: f64) -> (f64, f64) {
        let pacing = Pacing::default();
        let mut world = World::new(pacing, 20_000, vec![4 << 20; 1_000_000]);
        let (mut slowdowns, mut shares) = (vec![], vec![]);
        let mut random = 1u64;
        for step in 0..1000u32 {
            random = crate::ops::synthetic::splitmix64(random);
            let wobble = 1.0 + noise * ((random >> 40) as f64 / (1 << 23) as f64 - 1.0);
            let work = f64::from(1 + step % 7);
            let alone = (4.0 + 2.0 * work) * wobble;
            let (start, busy) = (world.now, world.busy);
            let mut end = start + (alone * 1e6) as Nanos;
            while world.now < end {
                world.look(Demand::Idle);
                let share = (world.busy - busy) as f64 / (world.now - start) as f64;
                end = start + (alone * 1e6 * (1.0 + harm * share.min(1.0))) as Nanos;
            }
            let ms = (world.now - start) as f64 / 1e6;
            if step >= 500 {
                slowdowns.push(ms / alone - 1.0);
                shares.push(world.schedule.share());
            }
            let queued = !world.queue.is_empty();
            world.schedule.step(StepTime { ms, work }, queued, world.now);
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        (mean(slowdowns), mean(shares))
    }

    #[test]
    fn stores_that_harm_steps_get_less_time_and_those_that_do_not_get_all() {
        for noise in [0.0, 0.02] {
            for harm in [0.1, 0.3, 1.0] {
                let (slowdown, share) = settle(harm, noise);
                assert!(slowdown < 0.06, "{harm}: slowed down by {slowdown} at a share of {share}");
                assert!(share > 0.02 / harm && share < 1.0, "{harm}: a share of {share}");
            }
            let (_, share) = settle(0.01, noise);
            assert!(share > 0.95, "{share}");
        }
    }

    #[test]
    fn stores_are_not_held_back_for_steps_that_nobody_reports() {
        let mut world = World::new(Pacing::default(), 100_000, vec![4 << 20; 10_000]);
        let step = StepTime { ms: 1.0, work: 1.0 };
        while !world.schedule.throttle.holds(world.now) {
            world.look(Demand::Idle);
            world.schedule.step(step, true, world.now);
        }
        (0..20).for_each(|_| world.look(Demand::Idle));
        assert!(world.flying.is_empty(), "held back");
        let mut urgent = 0;
        while world.flying.is_empty() {
            world.look(Demand::Idle);
            urgent += 1;
        }
        assert!((1900..2100).contains(&urgent), "{urgent} looks of 0.1 ms");
        for step in [StepTime { ms: f64::NAN, work: 1.0 }, StepTime { ms: 1.0, work: -1.0 }] {
            world.schedule.step(step, true, world.now);
        }
        assert_eq!(world.schedule.share(), 1.0);
    }

    #[test]
    fn figures_that_make_no_sense_are_refused() {
        let good = Pacing::default();
        assert!(good.check().is_ok());
        for bad in [
            Pacing { chunk_bytes: 0, ..good },
            Pacing { beside_loads: 0.0, ..good },
            Pacing { beside_loads: 1.1, ..good },
            Pacing { beside_loads: f64::NAN, ..good },
            Pacing { tolerated_slowdown: -0.1, ..good },
            Pacing { tolerated_slowdown: f64::NAN, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
