//! What stores wait for: events on the compute stream behind the work that wrote their blocks (R2).
//!
//! An event that a queued store still has to wait for is not recorded again: it might be on another stream then.

use std::sync::Arc;

use super::parts::Parts;
use crate::device::{Device, Event, StreamRef};
use crate::error::Result;

/// One moment of a compute stream, or the moments at which the layers of one step were computed.
pub(super) struct Fence {
    whole: Event,
    /// Behind the last layer of each part.
    layers: Vec<Event>,
}

/// What a store starts behind.
#[derive(Clone)]
pub(super) enum Behind {
    /// All that was submitted before.
    All(Arc<Fence>),
    /// Each part behind its own layers.
    Layers(Arc<Fence>),
    /// Nothing: an injected fault.
    Nothing,
}

impl Behind {
    /// What part `part` of `num_parts` waits for.
    pub fn event(&self, part: usize, num_parts: usize) -> Option<&Event> {
        match self {
            Self::All(fence) => Some(&fence.whole),
            Self::Layers(fence) if num_parts == fence.layers.len() => fence.layers.get(part),
            Self::Layers(fence) => fence.layers.last(),
            Self::Nothing => None,
        }
    }
}

/// Fences that are used again once nobody waits for them.
pub(super) struct Fences {
    device: Device,
    pool: Vec<Arc<Fence>>,
    num_layers: usize,
    /// Of the last step, if all of its layers were marked and nothing has written blocks since.
    step: Option<Arc<Fence>>,
}

impl Fences {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), pool: Vec::new(), num_layers: 0, step: None }
    }

    /// From now on steps are marked in so many parts.
    pub fn set_parts(&mut self, parts: usize) {
        self.pool.clear();
        self.step = None;
        self.num_layers = parts;
    }

    fn free(&mut self) -> Result<Arc<Fence>> {
        if let Some(fence) = self.pool.iter().find(|fence| Arc::strong_count(fence) == 1) {
            return Ok(fence.clone());
        }
        let layers = (0..self.num_layers).map(|_| self.device.event()).collect::<Result<_>>()?;
        let fence = Arc::new(Fence { whole: self.device.event()?, layers });
        self.pool.push(fence.clone());
        Ok(fence)
    }

    /// A fence behind all that was submitted to `compute` so far.
    pub fn record(&mut self, compute: StreamRef<'_>) -> Result<Arc<Fence>> {
        let fence = self.free()?;
        compute.record(&fence.whole)?;
        Ok(fence)
    }

    /// Marks of a step that is about to be submitted.
    pub fn begin_step(&mut self, parts: &Arc<Parts>) -> Result<StepMarks> {
        self.step = None;
        Ok(StepMarks { fence: self.free()?, parts: parts.clone(), marked: 0 })
    }

    pub fn end_step(&mut self, marks: StepMarks) {
        let complete = self.num_layers > 0 && marks.marked == marks.fence.layers.len();
        self.step = complete.then_some(marks.fence);
    }

    /// Blocks are written outside of a step.
    pub fn forget_step(&mut self) {
        self.step = None;
    }

    /// What stores start behind that are submitted now; `all` is behind everything.
    pub fn behind(&self, all: &Arc<Fence>) -> Behind {
        match &self.step {
            Some(step) => Behind::Layers(step.clone()),
            None => Behind::All(all.clone()),
        }
    }
}

impl Fence {
    pub fn whole(&self) -> &Event {
        &self.whole
    }
}

/// The moments at which the layers of a step are computed: see [`Engine::begin_step`](super::Engine::begin_step).
#[must_use = "without Engine::end_step stores wait for the whole step"]
pub struct StepMarks {
    fence: Arc<Fence>,
    parts: Arc<Parts>,
    /// Parts whose last layer was submitted.
    marked: usize,
}

impl StepMarks {
    /// The append of `layer` has been submitted to `compute`. Layers are told in their order, every one of them; a
    /// step that leaves some out is stored behind its end.
    ///
    /// # Errors
    /// Driver errors.
    pub fn layer_computed(&mut self, layer: u32, compute: StreamRef<'_>) -> Result<()> {
        if self.parts.ends_with(layer) == Some(self.marked)
            && let Some(event) = self.fence.layers.get(self.marked)
        {
            compute.record(event)?;
            self.marked += 1;
        }
        Ok(())
    }
}
