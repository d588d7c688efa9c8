//! How long work takes: CUDA graphs of it between timed events, medians over many replays.

use std::time::Instant;

use hybridkv::device::cuda::Graph;
use hybridkv::device::{Device, Event, StreamRef};
use hybridkv::error::Result;

/// Work that is submitted over and over, each time on other memory, so that no cache holds it.
pub trait Workload {
    /// Submissions after which the memory repeats.
    fn rounds(&self) -> usize;

    /// Submissions that a timing holds at least, so that its start and its end do not count where they would not
    /// in the work's real place.
    fn submissions(&self) -> usize {
        self.rounds()
    }

    /// Submits round `round`; it lasts until the stream has passed it.
    ///
    /// # Errors
    /// Whatever the launch says.
    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()>;

    /// Whether a graph can hold it. What cannot be captured is submitted directly.
    fn in_graph(&self) -> bool {
        true
    }
}

/// Times of one submission, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// The median.
    pub us: f64,
    /// The range from the tenth to the ninetieth percentile over the median.
    pub spread: f64,
    /// How many timings that is.
    pub samples: usize,
}

/// Runs all rounds of `work` for warm-up, then again and again for about `seconds` (5 times at
/// least). Every sample is the mean over its submissions. `meanwhile` is called while the device is busy.
pub fn measure(
    device: &Device,
    work: &dyn Workload,
    seconds: f64,
    meanwhile: &mut dyn FnMut(),
) -> Result<Timing> {
    let stream = device.stream()?;
    let stream = stream.as_ref();
    let rounds = work.rounds().max(1);
    let submissions = work.submissions().next_multiple_of(rounds);
    let all_rounds = |stream: StreamRef<'_>| -> Result<()> {
        (0..submissions).try_for_each(|n| work.submit(n % rounds, stream))
    };
    let graph = if device.is_cuda() && work.in_graph() {
        Some(Graph::capture(stream, all_rounds)?)
    } else {
        None
    };
    let submit = || match &graph {
        // SAFETY: the workload keeps its memory alive; `measure` synchronises before it returns.
        Some(graph) => unsafe { graph.launch(stream) },
        None => all_rounds(stream),
    };
    submit()?;
    stream.synchronize()?;
    let start = Instant::now();
    submit()?;
    stream.synchronize()?;
    let once = start.elapsed().as_secs_f64();
    let samples = ((seconds / once) as usize).clamp(5, 200);

    let mut times = Vec::with_capacity(samples);
    if device.is_cuda() {
        let events: Vec<(Event, Event)> = (0..samples)
            .map(|_| Ok((device.timed_event()?, device.timed_event()?)))
            .collect::<Result<_>>()?;
        for (start, end) in &events {
            stream.record(start)?;
            submit()?;
            stream.record(end)?;
        }
        meanwhile();
        stream.synchronize()?;
        for (start, end) in &events {
            times.push(f64::from(end.elapsed_ms_since(start)?) * 1e3);
        }
    } else {
        for _ in 0..samples {
            let start = Instant::now();
            submit()?;
            stream.synchronize()?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile).round() as usize];
    let median = at(0.5);
    Ok(Timing {
        us: median / submissions as f64,
        spread: (at(0.9) - at(0.1)) / median,
        samples: times.len(),
    })
}
