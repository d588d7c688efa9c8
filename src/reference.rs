//! The reference: attention in f64 from its definition, by the dumbest correct code.
//!
//! Every output of every kernel is held against this file: logits, softmax and weighted sum of one query
//! at a time over plain arrays, no tiles, no running maximum, no splits. It shares no code with the
//! kernels or the manager; all that it takes from the crate is the name of the attention kinds.

use crate::spec::AttentionKind;

/// Whether the query at absolute position `query` sees the key at `key` (0-based).
///
/// A query before the start of its sequence (`query < 0`, padding) sees nothing.
pub fn sees(kind: AttentionKind, sink_tokens: u32, query: i64, key: i64) -> bool {
    if key < 0 || key > query {
        return false;
    }
    let in_window = match kind {
        AttentionKind::Full => true,
        AttentionKind::Sliding { window } => query - key < i64::from(window),
        AttentionKind::Chunked { chunk } => query / i64::from(chunk) == key / i64::from(chunk),
    };
    in_window || key < i64::from(sink_tokens)
}

/// Whether a query whose new tokens are seen by the bits of `tree` sees the key at `key`, as far as that says:
/// bit `u` is for the new token at `first_new + u`, tokens before `first_new` are seen. `None`: no tree.
pub fn tree_sees(tree: Option<u32>, first_new: i64, key: i64) -> bool {
    match (tree, key - first_new) {
        (Some(mask), new @ 0..32) => mask >> new & 1 == 1,
        _ => true,
    }
}

/// How a dot product of query and key becomes a logit, and what else is in the denominator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logits {
    /// Factor of the dot product.
    pub sm_scale: f64,
    /// `cap * tanh(logit / cap)` is applied when this is not 0.
    pub soft_cap: f64,
    /// A learned logit without a value: `exp(sink)` is added to the denominator once.
    pub sink: Option<f64>,
}

impl Logits {
    fn of(&self, query: &[f64], key: &[f64]) -> f64 {
        let logit = self.sm_scale * dot(query, key);
        if self.soft_cap == 0.0 { logit } else { self.soft_cap * (logit / self.soft_cap).tanh() }
    }
}

/// The attention state of one query and one head: normalised output and log-sum-exp of the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// `[head_dim]`, divided by the denominator.
    pub out: Vec<f64>,
    /// Natural log of the denominator, -inf when nothing is in it.
    pub lse: f64,
}

impl State {
    /// The state of a query that sees nothing: output 0, LSE -inf; merging it changes nothing.
    pub fn empty(head_dim: usize) -> Self {
        Self { out: vec![0.0; head_dim], lse: f64::NEG_INFINITY }
    }
}

/// The state of `query` over those rows of `keys` and `values` (both `[_, head_dim]`) that are listed.
pub fn attend(
    query: &[f64],
    keys: &[f64],
    values: &[f64],
    visible: &[usize],
    logits: Logits,
) -> State {
    let head_dim = query.len();
    let row = |j: usize| j * head_dim..(j + 1) * head_dim;
    let scores: Vec<f64> = visible.iter().map(|&j| logits.of(query, &keys[row(j)])).collect();
    let max = scores.iter().copied().chain(logits.sink).fold(f64::NEG_INFINITY, max_or_nan);
    if max == f64::NEG_INFINITY {
        return State::empty(head_dim);
    }
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sink = logits.sink.map_or(0.0, |sink| (sink - max).exp());
    let sum = weights.iter().sum::<f64>() + sink;
    let mut out = vec![0.0; head_dim];
    for (&j, weight) in visible.iter().zip(&weights) {
        add_scaled(&mut out, weight / sum, &values[row(j)]);
    }
    State { out, lse: max + sum.ln() }
}

/// Merges states (of `head_dim` elements) of the same query over disjoint keys. `sink` adds `exp(sink)` to
/// the denominator.
pub fn merge(head_dim: usize, states: &[State], sink: Option<f64>) -> State {
    // A state with an LSE of -inf is the identity, whatever its output holds.
    let states: Vec<&State> = states.iter().filter(|s| s.lse != f64::NEG_INFINITY).collect();
    let lses = states.iter().map(|state| state.lse);
    let max = lses.chain(sink).fold(f64::NEG_INFINITY, max_or_nan);
    if max == f64::NEG_INFINITY {
        return State::empty(head_dim);
    }
    let weights: Vec<f64> = states.iter().map(|state| (state.lse - max).exp()).collect();
    let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
    let mut out = vec![0.0; head_dim];
    for (state, weight) in states.iter().zip(&weights) {
        add_scaled(&mut out, weight / sum, &state.out);
    }
    State { out, lse: max + sum.ln() }
}

/// `f64::max` drops NaN; a NaN logit must not vanish.
fn max_or_nan(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Eight partial sums, so that the processor need not wait for each addition.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut partial = [0.0; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..8 {
            partial[lane] += x[lane] * y[lane];
        }
    }
    partial.iter().sum::<f64>() + tail
}

fn add_scaled(out: &mut [f64], factor: f64, values: &[f64]) {
    for (o, v) in out.iter_mut().zip(values) {
        *o += factor * v;
    }
}

/// How far an array is from its reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Relative Frobenius error, `|ours - reference| / |reference|` over all elements.
    pub relative: f64,
    /// The largest relative error of one row: an error that a big array would drown.
    pub worst_row: f64,
    /// Index of that row.
    pub worst_row_index: usize,
    /// Largest absolute error of one element.
    pub max_abs: f64,
    /// `1 - 2 <ours, reference> / (|ours|^2 + |reference|^2)`: 0 when equal, 1 when orthogonal.
    pub cosine_distance: f64,
    /// Elements where one side is NaN or infinite and the other is not the same.
    pub misplaced: usize,
    /// Elements compared.
    pub elements: usize,
}

/// Compares rows of `row_len` elements. Elements that are NaN, or the same infinity, on both sides are
/// equal; where only one side is, they are counted as misplaced and left out of the errors. Differences up
/// to `floor`, what the type of `ours` cannot tell from 0, are none.
pub fn compare(ours: &[f64], reference: &[f64], row_len: usize, floor: f64) -> Comparison {
    let mut total = Sums::default();
    let mut result = Comparison {
        relative: 0.0,
        worst_row: 0.0,
        worst_row_index: 0,
        max_abs: 0.0,
        cosine_distance: 0.0,
        misplaced: ours.len().abs_diff(reference.len()),
        elements: ours.len().min(reference.len()),
    };
    let rows = ours.chunks(row_len.max(1)).zip(reference.chunks(row_len.max(1)));
    for (index, (ours, reference)) in rows.enumerate() {
        let mut row = Sums::default();
        for (&x, &y) in ours.iter().zip(reference) {
            if x.is_finite() && y.is_finite() {
                let x = if (x - y).abs() <= floor { y } else { x };
                row.add(x, y);
                result.max_abs = result.max_abs.max((x - y).abs());
            } else if !(x.is_nan() && y.is_nan() || x == y) {
                result.misplaced += 1;
            }
        }
        if row.relative() > result.worst_row {
            result.worst_row = row.relative();
            result.worst_row_index = index;
        }
        total.add_all(&row);
    }
    result.relative = total.relative();
    result.cosine_distance = total.cosine_distance();
    result
}

/// Sums behind the errors of a [`Comparison`].
#[derive(Default)]
struct Sums {
    difference: f64,
    ours: f64,
    reference: f64,
    product: f64,
}

impl Sums {
    fn add(&mut self, x: f64, y: f64) {
        self.difference += (x - y) * (x - y);
        self.ours += x * x;
        self.reference += y * y;
        self.product += x * y;
    }

    fn add_all(&mut self, other: &Self) {
        self.difference += other.difference;
        self.ours += other.ours;
        self.reference += other.reference;
        self.product += other.product;
    }

    fn relative(&self) -> f64 {
        match (self.difference, self.reference) {
            (0.0, _) => 0.0,
            (difference, reference) => (difference / reference).sqrt(),
        }
    }

    fn cosine_distance(&self) -> f64 {
        match self.ours + self.reference {
            0.0 => 0.0,
            sum => (1.0 - 2.0 * self.product / sum).max(0.0),
        }
    }
}

/// The largest errors that still count as right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Of [`Comparison::relative`].
    pub relative: f64,
    /// Of [`Comparison::worst_row`].
    pub worst_row: f64,
    /// Of [`Comparison::max_abs`].
    pub max_abs: f64,
    /// Of [`Comparison::cosine_distance`].
    pub cosine_distance: f64,
}

impl Tolerance {
    /// Bit-exact results: data that was only moved.
    pub const EXACT: Self =
        Self { relative: 0.0, worst_row: 0.0, max_abs: 0.0, cosine_distance: 0.0 };

    /// What is wrong with `comparison`, or `None`.
    pub fn violation(&self, comparison: &Comparison) -> Option<String> {
        let c = comparison;
        // Written so that a NaN violates.
        let within = |value: f64, limit: f64| value <= limit;
        if c.misplaced > 0 {
            return Some(format!("{} elements are NaN, infinite or missing", c.misplaced));
        }
        if !within(c.relative, self.relative) {
            return Some(format!("relative error {:.3e} > {:.1e}", c.relative, self.relative));
        }
        if !within(c.worst_row, self.worst_row) {
            return Some(format!(
                "relative error of row {} {:.3e} > {:.1e}",
                c.worst_row_index, c.worst_row, self.worst_row
            ));
        }
        if !within(c.max_abs, self.max_abs) {
            return Some(format!("absolute error {:.3e} > {:.1e}", c.max_abs, self.max_abs));
        }
        if !within(c.cosine_distance, self.cosine_distance) {
            return Some(format!(
                "cosine distance {:.3e} > {:.1e}",
                c.cosine_distance, self.cosine_distance
            ));
        }
        None
    }
}
