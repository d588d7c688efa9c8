//! A bounded queue of jobs, and threads that do them: whichever is free takes the next. Every job that was taken in
//! is reported once, after it has been done; when the queue is dropped, all its threads have ended.
//!
//! This is all that the threads of an engine share, besides what the jobs themselves hold. `super::sync` names the
//! locks, channels and threads: those of the standard library, and in tests those of a model checker.

use super::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use super::sync::thread::{Builder, JoinHandle};
use super::sync::{Arc, Mutex, PoisonError};

/// Jobs of type `J`, of each of which comes a report of type `R`.
pub(super) struct Queue<J, R> {
    /// `None` once the threads are to end.
    jobs: Option<SyncSender<J>>,
    reports: Receiver<R>,
    threads: Vec<JoinHandle<()>>,
    outstanding: usize,
}

impl<J: Send + 'static, R: Send + 'static> Queue<J, R> {
    /// A queue in which up to `waiting` jobs wait for one of so many threads, which `work` on them.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn new(
        threads: usize,
        waiting: usize,
        work: impl Fn(J) -> R + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, taken) = sync_channel::<J>(waiting);
        let (report, reports) = channel();
        let taken = Arc::new(Mutex::new(taken));
        let mut queue = Self { jobs: Some(jobs), reports, threads: Vec::new(), outstanding: 0 };
        for _ in 0..threads.max(1) {
            let (taken, report, work) = (taken.clone(), report.clone(), work.clone());
            let thread = Builder::new().name("hybridkv-storage".into()).spawn(move || {
                loop {
                    let job = taken.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    // Nobody may be left to listen.
                    let _ = report.send(work(job));
                }
            });
            queue.threads.push(thread?);
        }
        Ok(queue)
    }

    /// Takes in a job. Blocks while too many wait; whether it was taken in.
    pub fn start(&mut self, job: J) -> bool {
        let taken = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        self.outstanding += usize::from(taken);
        taken
    }

    /// The next report, if there is one.
    pub fn poll(&mut self) -> Option<R> {
        let report = self.reports.try_recv().ok()?;
        self.outstanding -= 1;
        Some(report)
    }

    /// Waits for the next report; `None` when nothing is outstanding.
    pub fn wait(&mut self) -> Option<R> {
        if self.outstanding == 0 {
            return None;
        }
        let report = self.reports.recv().ok()?;
        self.outstanding -= 1;
        Some(report)
    }

    /// Jobs that have not been reported.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }
}

impl<J, R> Drop for Queue<J, R> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // One that panicked has nothing left to do.
            let _ = thread.join();
        }
    }
}
