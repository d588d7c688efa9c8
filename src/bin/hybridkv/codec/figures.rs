//! What a codec makes of a capture: bytes, errors of K and V, and what these do to attention.

use std::time::Instant;

use hybridkv::codec::{Codec, Encoded, Geometry, decode};
use hybridkv::error::Result;
use hybridkv::reference::{Logits, attend};
use serde::Serialize;

use super::capture::{Capture, Layer, Tensor, to_f32};

/// The last queries of a capture, which see the most keys, stand for all.
const QUERIES: usize = 128;

/// One codec on one capture.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    pub codec: &'static str,
    /// Blocks, and those that the codec did not hold.
    pub blocks: usize,
    pub fallbacks: usize,
    /// Elements outside of their windows, of all.
    pub escapes: usize,
    pub elements: usize,
    /// Of those stored, headers and scales included, with fallbacks raw.
    pub bits_per_element: f64,
    /// Bytes of a block over the most that a slot has.
    pub slot_ratio: f64,
    /// Bytes of all blocks over those stored, with fallbacks raw.
    pub mean_ratio: f64,
    /// Every bit came back.
    pub exact: bool,
    pub k_relative: f64,
    pub v_relative: f64,
    /// Of scaled logits.
    pub logit_rmse: f64,
    /// Relative L2 error of the attention output of a layer's head, over all of them.
    pub attention_mean: f64,
    pub attention_p99: f64,
    pub attention_max: f64,
    /// The least cosine of any query's output with what it should be.
    pub least_cosine: f64,
    /// Of uncompressed bytes, on one thread.
    pub encode_gbps: f64,
    pub decode_gbps: f64,
}

impl Figures {
    /// Encodes and decodes the whole blocks of a capture; tokens past the last one stay as they are.
    pub fn of(codec: Codec, capture: &Capture, geometry: &Geometry) -> Result<Self> {
        let mut restored = capture.clone();
        let mut slot = vec![0; codec.slot_bytes(geometry)?];
        let mut back = vec![0; geometry.elements()];
        let blocks = capture.tokens / geometry.block_size();
        let raw = geometry.raw_bytes();
        let (mut fallbacks, mut escaped, mut stored) = (0, 0, 0);
        let (mut encoding, mut decoding) = (0.0, 0.0);
        for index in 0..blocks {
            let block = gather(capture, geometry, index);
            let start = Instant::now();
            let encoded = codec.encode(geometry, &block, &mut slot)?;
            encoding += start.elapsed().as_secs_f64();
            match encoded {
                Encoded::Fits { bytes, escapes, .. } => {
                    escaped += escapes as usize;
                    stored += bytes as usize;
                }
                Encoded::RawFallback(_) => {
                    fallbacks += 1;
                    stored += raw;
                    continue;
                }
            }
            let start = Instant::now();
            decode(geometry, &slot, &mut back)?;
            decoding += start.elapsed().as_secs_f64();
            scatter(&mut restored, geometry, index, &back);
        }
        let held = blocks - fallbacks;
        let rate = |blocks: usize, seconds: f64| (blocks * raw) as f64 / seconds.max(1e-9) / 1e9;
        let pairs = || capture.layers.iter().zip(&restored.layers);
        let equal = |part: fn(&Layer) -> &Tensor| {
            pairs().all(|(a, b)| part(a).elements == part(b).elements)
        };
        let attention = Attention::of(capture, &restored);
        Ok(Self {
            codec: codec.name(),
            blocks,
            fallbacks,
            escapes: escaped,
            elements: held * geometry.elements(),
            bits_per_element: 8.0 * stored as f64 / (blocks.max(1) * geometry.elements()) as f64,
            slot_ratio: raw as f64 / slot.len() as f64,
            mean_ratio: (blocks * raw) as f64 / stored as f64,
            exact: equal(|layer| &layer.k) && equal(|layer| &layer.v),
            k_relative: relative(pairs().map(|(a, b)| (&a.k, &b.k))),
            v_relative: relative(pairs().map(|(a, b)| (&a.v, &b.v))),
            logit_rmse: attention.logit_rmse,
            attention_mean: attention.errors.iter().sum::<f64>() / attention.errors.len() as f64,
            attention_p99: percentile(&attention.errors, 99),
            attention_max: percentile(&attention.errors, 100),
            least_cosine: attention.least_cosine,
            encode_gbps: rate(blocks, encoding),
            decode_gbps: rate(held, decoding),
        })
    }
}

/// Block `index` as a native block has it, `[layer][K|V][head][token][dim]`.
fn gather(capture: &Capture, geometry: &Geometry, index: usize) -> Vec<u16> {
    let mut block = Vec::with_capacity(geometry.elements());
    let tokens = index * geometry.block_size()..(index + 1) * geometry.block_size();
    for layer in &capture.layers {
        for tensor in [&layer.k, &layer.v] {
            for head in 0..tensor.heads {
                tokens.clone().for_each(|token| block.extend(tensor.row(token, head)));
            }
        }
    }
    block
}

/// Writes a block back.
fn scatter(capture: &mut Capture, geometry: &Geometry, index: usize, block: &[u16]) {
    let mut rows = block.chunks_exact(geometry.head_dim());
    let tokens = index * geometry.block_size()..(index + 1) * geometry.block_size();
    for layer in &mut capture.layers {
        for tensor in [&mut layer.k, &mut layer.v] {
            for head in 0..tensor.heads {
                for (token, row) in tokens.clone().zip(&mut rows) {
                    tensor.row_mut(token, head).copy_from_slice(row);
                }
            }
        }
    }
}

/// Relative L2 error of all elements of pairs of tensors, the second of each being ours.
fn relative<'a>(pairs: impl Iterator<Item = (&'a Tensor, &'a Tensor)>) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (reference, ours) in pairs {
        for (x, y) in reference.elements.iter().zip(&ours.elements) {
            let x = f64::from(to_f32(reference.dtype, *x));
            error += (f64::from(to_f32(ours.dtype, *y)) - x).powi(2);
            norm += x * x;
        }
    }
    ratio(error, norm)
}

/// Root of a quotient of squares; of nothing over nothing, 0.
fn ratio(error: f64, norm: f64) -> f64 {
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// The value that `percent` of all are not above.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or(0.0)
}

/// Causal attention of the last queries over other keys and values than they should see.
struct Attention {
    /// By layer and query head: relative L2 error of the outputs.
    errors: Vec<f64>,
    least_cosine: f64,
    logit_rmse: f64,
}

impl Attention {
    fn of(reference: &Capture, ours: &Capture) -> Self {
        let mut result = Self { errors: Vec::new(), least_cosine: 1.0, logit_rmse: 0.0 };
        let (mut squares, mut logits) = (0.0, 0usize);
        let tokens = reference.tokens;
        for (layer, other) in reference.layers.iter().zip(&ours.layers) {
            let dim = layer.k.dim;
            let sm_scale = 1.0 / (dim as f64).sqrt();
            let parameters = Logits { sm_scale, soft_cap: 0.0, sink: None };
            let ratio_of_heads = layer.q.heads / layer.k.heads;
            for kv_head in 0..layer.k.heads {
                let [keys, values] = [&layer.k, &layer.v].map(|t| head(t, tokens, kv_head));
                let [our_keys, our_values] = [&other.k, &other.v].map(|t| head(t, tokens, kv_head));
                let differences: Vec<f64> =
                    keys.iter().zip(&our_keys).map(|(x, y)| y - x).collect();
                for q_head in kv_head * ratio_of_heads..(kv_head + 1) * ratio_of_heads {
                    let queries = head(&layer.q, tokens, q_head);
                    let (mut error, mut norm) = (0.0, 0.0);
                    for token in tokens.saturating_sub(QUERIES)..tokens {
                        let query = &queries[token * dim..][..dim];
                        for difference in differences[..(token + 1) * dim].chunks_exact(dim) {
                            squares += (sm_scale * dot(query, difference)).powi(2);
                        }
                        logits += token + 1;
                        let visible: Vec<usize> = (0..=token).collect();
                        let right = attend(query, &keys, &values, &visible, parameters).out;
                        let out = attend(query, &our_keys, &our_values, &visible, parameters).out;
                        let [xx, yy, xy] =
                            [dot(&right, &right), dot(&out, &out), dot(&right, &out)];
                        error += right.iter().zip(&out).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
                        norm += xx;
                        if xx * yy > 0.0 {
                            result.least_cosine =
                                result.least_cosine.min(xy / (xx.sqrt() * yy.sqrt()));
                        }
                    }
                    result.errors.push(ratio(error, norm));
                }
            }
        }
        result.logit_rmse = (squares / logits as f64).sqrt();
        result
    }
}

/// One head of a tensor, `[token, head_dim]`.
fn head(tensor: &Tensor, tokens: usize, head: usize) -> Vec<f64> {
    let rows = (0..tokens).flat_map(|token| tensor.row(token, head));
    rows.map(|x| f64::from(to_f32(tensor.dtype, *x))).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
