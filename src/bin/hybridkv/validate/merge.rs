//! `merge_states` against the reference: partial states of every type, identities that hold garbage.

use hybridkv::device::Span;
use hybridkv::error::Result;
use hybridkv::layout::Dtype;
use hybridkv::ops::{HeadStrides, MergeArgs};
use hybridkv::reference::{self, State};

use super::bed::{
    Bed, Fault, GUARD, LSE_TOLERANCE, Outcome, POISON, POISON_F32, decode, encode, floor, stray,
    tolerance,
};
use crate::random::Rng;

/// One case of `merge_states`.
#[derive(Debug)]
pub struct Case {
    states: usize,
    tokens: usize,
    /// Rows of tokens from this one on are to be left alone.
    live_tokens: Option<usize>,
    heads: usize,
    head_dim: usize,
    in_dtype: Dtype,
    out_dtype: Dtype,
    lse: bool,
    sink_logits: bool,
    /// Of a hundred states, how many are the identity.
    empty: u64,
    /// Elements of gap between heads, and between tokens, of the output.
    gaps: (usize, usize),
    /// Size of the LSE: e^lse must not overflow on the way.
    magnitude: f32,
}

impl Case {
    /// Draws a case of at most `elements` elements of states.
    pub fn random(rng: &mut Rng, elements: usize) -> Self {
        let head_dim = rng.pick(&[64, 128, 128, 256]);
        let heads = rng.pick(&[1, 2, 5, 8, 32]);
        let states = rng.pick(&[0, 1, 2, 2, 3, 7, 16, 33, 64]);
        let tokens =
            rng.range(1, (elements / (head_dim * heads * states.max(1))).clamp(1, 300) as u64);
        let out_dtype = rng.pick(&[Dtype::Bf16, Dtype::F16]);
        Self {
            states,
            tokens: tokens as usize,
            live_tokens: rng.chance(30).then(|| rng.below(tokens + 1) as usize),
            heads,
            head_dim,
            in_dtype: rng.pick(&[Dtype::F32, Dtype::F32, out_dtype]),
            out_dtype,
            lse: rng.chance(70),
            sink_logits: rng.chance(30),
            empty: rng.pick(&[0, 0, 30, 100]),
            gaps: rng.pick(&[(0, 0), (0, 0), (8, 0), (0, 24), (16, 8)]),
            magnitude: rng.pick(&[1.0, 1.0, 10.0, 300.0]),
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        format!("merge {} to {}", self.in_dtype.name(), self.out_dtype.name())
    }

    /// The case's name.
    pub fn name(&self) -> String {
        format!(
            "merge/{}x{}/{}/d{}/{}-{} live{:?} empty{}% gaps{:?} lse*{}{}{}",
            self.states,
            self.tokens,
            self.heads,
            self.head_dim,
            self.in_dtype.name(),
            self.out_dtype.name(),
            self.live_tokens,
            self.empty,
            self.gaps,
            self.magnitude,
            if self.sink_logits { " sink-logits" } else { "" },
            if self.lse { " lse" } else { "" },
        )
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let (rows, dim) = (self.tokens * self.heads, self.head_dim);
        // As they lie in memory: 16- or 32-bit elements.
        let mut bytes: Vec<u8> = Vec::with_capacity(self.states * rows * dim * 4);
        let mut lse: Vec<f32> = Vec::with_capacity(self.states * rows);
        let mut by_row = vec![Vec::with_capacity(self.states); rows];
        for _ in 0..self.states {
            for row in &mut by_row {
                let empty = rng.chance(self.empty);
                let magnitude = self.magnitude;
                let state_lse =
                    if empty { f32::NEG_INFINITY } else { rng.normals(1).sum::<f32>() * magnitude };
                let values: Vec<f32> = rng.normals(dim).collect();
                let mut out = Vec::with_capacity(dim);
                for value in values {
                    // What the identity holds is not to be looked at.
                    let value = if empty { f32::NAN } else { value };
                    if self.in_dtype == Dtype::F32 {
                        bytes.extend(value.to_ne_bytes());
                        out.push(f64::from(value));
                    } else {
                        let bits = encode(self.in_dtype, value);
                        bytes.extend(bits.to_ne_bytes());
                        out.push(decode(self.in_dtype, bits));
                    }
                }
                lse.push(state_lse);
                row.push(State { out, lse: state_lse.into() });
            }
        }
        let sinks: Vec<f32> = rng.normals(self.heads).collect();

        let head_stride = dim + self.gaps.0;
        let token_stride = self.heads * head_stride + self.gaps.1;
        let row_at =
            |row: usize| GUARD + row / self.heads * token_stride + row % self.heads * head_stride;
        let out_elements = row_at(rows - 1) + dim + GUARD;
        let out = bed.device.upload(&vec![POISON; out_elements])?;
        let out_lse = bed.device.upload(&vec![POISON_F32; rows + 2 * GUARD])?;
        let mut given = lse.clone();
        match bed.fault {
            Some(Fault::Length) if self.states > 0 => given[0] += 0.1,
            Some(Fault::Swap) if self.states > 0 => given.swap(0, self.states * rows - 1),
            Some(Fault::Nan) if self.states > 0 => bytes[..4].fill(0xff),
            _ => {}
        }
        let live = self.live_tokens.unwrap_or(self.tokens);
        let skipped = i32::from(bed.fault == Some(Fault::Skip));
        let live_tokens = bed.device.upload(&[live as i32 - skipped])?;
        let states = bed.device.upload(&bytes)?;
        let [state_lse, sink_logits] = [bed.device.upload(&given)?, bed.device.upload(&sinks)?];
        let args = MergeArgs {
            states: states.span(),
            state_lse: state_lse.span(),
            in_dtype: self.in_dtype,
            out: Span::new(out.address() + 2 * GUARD as u64, 2 * (out_elements - 2 * GUARD) as u64),
            out_strides: HeadStrides { token: token_stride as i64, head: head_stride as i64 },
            out_dtype: self.out_dtype,
            lse: self.lse.then(|| Span::new(out_lse.address() + 4 * GUARD as u64, 4 * rows as u64)),
            sink_logits: self.sink_logits.then(|| sink_logits.span()),
            live_tokens: self.live_tokens.map(|_| live_tokens.span()),
            num_states: self.states as u32,
            num_tokens: self.tokens as u32,
            num_qo_heads: self.heads as u32,
            head_dim: dim as u32,
        };
        let stream = bed.stream.as_ref();
        // SAFETY: all buffers live until the stream is synchronised.
        unsafe {
            bed.kernels.merge_states(&args, stream)?;
            if bed.fault == Some(Fault::Stray) {
                stream.fill(out.address(), 0, 2)?;
            }
        }
        stream.synchronize()?;

        let mut outcome = Outcome::default();
        let after: Vec<u16> = out.download()?;
        let after_lse: Vec<u32> = out_lse.download()?;
        let rows = live * self.heads;
        let mut written = vec![false; out_elements];
        (0..rows).for_each(|row| written[row_at(row)..row_at(row) + dim].fill(true));
        if let Some(i) = stray(&vec![POISON; out_elements], &after, |i| written[i]) {
            outcome.fail(format!(
                "wrote beside the output, at element {} of it",
                i as i64 - GUARD as i64
            ));
        }
        let lse_row = |i: usize| self.lse && (GUARD..GUARD + rows).contains(&i);
        if let Some(i) = stray(&vec![POISON_F32; after_lse.len()], &after_lse, lse_row) {
            outcome.fail(format!(
                "wrote beside the LSE, at element {} of it",
                i as i64 - GUARD as i64
            ));
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (row, states) in by_row[..rows].iter().enumerate() {
            let sink = self.sink_logits.then(|| sinks[row % self.heads].into());
            let state = reference::merge(dim, states, sink);
            ours.extend(after[row_at(row)..][..dim].iter().map(|&x| decode(self.out_dtype, x)));
            theirs.extend(&state.out);
            if self.lse {
                let ours = f32::from_bits(after_lse[GUARD + row]);
                outcome.judge_lse(format_args!("row {row}"), ours, state.lse, LSE_TOLERANCE);
            }
        }
        let comparison = reference::compare(&ours, &theirs, dim, floor(self.out_dtype));
        outcome.judge("out", &comparison, &tolerance(self.out_dtype));
        Ok(outcome)
    }
}
