//! What every suite needs: the device under test, guarded memory, encoded elements, verdicts.

use std::sync::Arc;

use half::{bf16, f16};
use hybridkv::device::{Device, DeviceBuffer, Stream};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::Dtype;
use hybridkv::ops::Kernels;
use hybridkv::reference::{Comparison, Tolerance};

/// The device under test and its kernels.
pub struct Bed {
    /// Where everything runs.
    pub device: Device,
    /// What is tested.
    pub kernels: Arc<Kernels>,
    /// Where it is submitted.
    pub stream: Stream,
    /// Damage done on purpose to what the kernels are given, to see that the checks notice.
    pub fault: Option<Fault>,
}

/// Damage to the inputs of a kernel that its reference does not get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// A sliding window is one token smaller.
    Window,
    /// Two entries of the block table, the list of slots or the descriptors are swapped.
    Swap,
    /// One token, state or fragment is left out: its output stays unwritten.
    Skip,
    /// One sequence is a token shorter; one state weighs more; one fragment ends early.
    Length,
    /// A NaN stands where a key, a value or a source is.
    Nan,
    /// One element beside the output is overwritten.
    Stray,
}

/// How one case went.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Errors by name: `relative`, `worst_row`, `max_abs`, `cosine`, `lse`.
    pub errors: Vec<(&'static str, f64)>,
    /// The bound of `relative` (0: bit-exact).
    pub tolerance: f64,
    /// What is wrong, when something is.
    pub failure: Option<String>,
    /// Whether a driver call failed: nothing that follows on the device means anything.
    pub device_is_lost: bool,
}

impl Outcome {
    /// Notes a failure; the first one is kept.
    pub fn fail(&mut self, message: impl Into<String>) {
        self.failure.get_or_insert_with(|| message.into());
    }

    /// Notes errors and whether they are within the tolerance; keeps the worse of two.
    pub fn judge(&mut self, what: &str, comparison: &Comparison, tolerance: &Tolerance) {
        self.tolerance = tolerance.relative;
        for (name, value) in [
            ("relative", comparison.relative),
            ("worst_row", comparison.worst_row),
            ("max_abs", comparison.max_abs),
            ("cosine", comparison.cosine_distance),
        ] {
            self.note(name, value);
        }
        if let Some(violation) = tolerance.violation(comparison) {
            self.fail(format!("{what}: {violation}"));
        }
    }

    /// Notes the error of the LSE of a row and whether it is within the tolerance.
    pub fn judge_lse(
        &mut self,
        row: impl std::fmt::Display,
        ours: f32,
        reference: f64,
        allowed: f64,
    ) {
        let ours = f64::from(ours);
        let error = if ours == reference { 0.0 } else { (ours - reference).abs() };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        self.note("lse", error);
        if error > allowed {
            self.fail(format!("LSE of {row} is {ours}, not {reference}"));
        }
    }

    /// Notes an error; keeps the worse of two of a name.
    pub fn note(&mut self, name: &'static str, value: f64) {
        match self.errors.iter_mut().find(|(known, _)| *known == name) {
            Some((_, worst)) => *worst = worst.max(value),
            None => self.errors.push((name, value)),
        }
    }
}

/// What attention outputs of this type may differ from the reference, on logits of ordinary size.
pub fn tolerance(dtype: Dtype) -> Tolerance {
    // P and O are rounded to the type; a row of a few keys shows that rounding undiluted.
    let relative = match dtype {
        Dtype::Bf16 => 4e-3,
        Dtype::F16 => 5e-4,
        // No output is of 8 bits.
        Dtype::F32 | Dtype::E4m3 => 1e-5,
    };
    Tolerance {
        relative,
        worst_row: 4.0 * relative,
        max_abs: f64::INFINITY,
        cosine_distance: relative * relative,
    }
}

/// The largest value that the type, subnormals flushed in bf16 and f32, may show as 0.
pub fn floor(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 2f64.powi(-25),
        Dtype::Bf16 | Dtype::F32 | Dtype::E4m3 => 2f64.powi(-126),
    }
}

/// Largest error of an LSE.
pub const LSE_TOLERANCE: f64 = 1e-3;

/// A NaN in bf16, f16 and, doubled, in f32: what is neither written nor visible.
pub const POISON: u16 = 0xffa5;
/// The same for 32-bit outputs.
pub const POISON_F32: u32 = 0xffa5_a5a5;
/// Elements before and after an output that must stay as they are; keeps 256-byte alignment.
pub const GUARD: usize = 256;

/// The nearest value of the type.
pub fn encode(dtype: Dtype, value: f32) -> u16 {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_bits(),
        _ => bf16::from_f32(value).to_bits(),
    }
}

/// The value of an element.
pub fn decode(dtype: Dtype, bits: u16) -> f64 {
    match dtype {
        Dtype::F16 => f16::from_bits(bits).to_f64(),
        _ => bf16::from_bits(bits).to_f64(),
    }
}

/// Keys and values on the host: elements of a type, poisoned where nothing was put.
pub struct Elements {
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl Elements {
    /// So many elements, all poisoned.
    pub fn poisoned(dtype: Dtype, count: usize) -> Self {
        let mut elements = Self { dtype, bytes: vec![0; count * dtype.bytes()] };
        (0..count).for_each(|index| elements.poison(index));
        elements
    }

    /// Puts the nearest element.
    pub fn put(&mut self, index: usize, value: f32) {
        match self.dtype {
            Dtype::E4m3 => self.bytes[index] = e4m3::from_f32(value),
            dtype => self.put_bits(index, encode(dtype, value)),
        }
    }

    /// Makes an element NaN.
    pub fn poison(&mut self, index: usize) {
        match self.dtype {
            Dtype::E4m3 => self.bytes[index] = 0xff,
            _ => self.put_bits(index, POISON),
        }
    }

    fn put_bits(&mut self, index: usize, bits: u16) {
        self.bytes[2 * index..2 * index + 2].copy_from_slice(&bits.to_le_bytes());
    }

    /// The value of an element.
    pub fn get(&self, index: usize) -> f64 {
        match self.dtype {
            Dtype::E4m3 => e4m3::to_f32(self.bytes[index]).into(),
            dtype => {
                let [low, high] = [self.bytes[2 * index], self.bytes[2 * index + 1]];
                decode(dtype, u16::from_le_bytes([low, high]))
            }
        }
    }

    /// As they lie in memory.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Bed {
    /// Writes an array from the start of a device buffer on and waits until it is there.
    pub fn write<T: bytemuck::Pod>(&self, buffer: &DeviceBuffer, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(bytes.len() <= buffer.len(), "{} bytes into {}", bytes.len(), buffer.len());
        let mut staging = self.device.alloc_pinned(bytes.len())?;
        staging.as_mut_slice().copy_from_slice(bytes);
        // SAFETY: both buffers live until the stream has passed the copy, and it is waited for.
        unsafe {
            self.stream.as_ref().copy(staging.address(), buffer.address(), bytes.len())?;
        }
        self.stream.as_ref().synchronize()
    }

    /// Device memory for `elements` values of `T`, uninitialised.
    pub fn room<T>(&self, elements: usize) -> Result<DeviceBuffer> {
        self.device.alloc(elements * size_of::<T>())
    }
}

/// The first element at which `after` differs from `before` beside the elements that `written` allows.
pub fn stray<T: PartialEq>(
    before: &[T],
    after: &[T],
    written: impl Fn(usize) -> bool,
) -> Option<usize> {
    (0..before.len()).find(|&i| before[i] != after[i] && !written(i))
}
