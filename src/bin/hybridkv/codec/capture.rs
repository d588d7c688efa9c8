//! Captured queries, keys and values: a safetensors file with `layerN.q`, `layerN.k`, `layerN.v` for every layer
//! it holds, each `[token, head, head_dim]` of 16-bit elements, q and k after rotary embedding.
//!
//! Elements are BF16 or F16, or U16 for the bit patterns of bf16. The form of the file: 8 bytes of length, that
//! many of JSON (a map from names to type, shape and byte range), then the data.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::layout::Dtype;
use serde::Deserialize;

const OP: &str = "codec";

/// One tensor, `[token, head, head_dim]`.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub heads: usize,
    pub dim: usize,
    pub dtype: Dtype,
    /// Bit patterns.
    pub elements: Vec<u16>,
}

impl Tensor {
    /// One head of a token.
    pub fn row(&self, token: usize, head: usize) -> &[u16] {
        &self.elements[(token * self.heads + head) * self.dim..][..self.dim]
    }

    /// Likewise, to change.
    pub fn row_mut(&mut self, token: usize, head: usize) -> &mut [u16] {
        &mut self.elements[(token * self.heads + head) * self.dim..][..self.dim]
    }

    fn tokens(&self) -> usize {
        self.elements.len() / (self.heads * self.dim)
    }
}

/// What a layer attended.
#[derive(Debug, Clone)]
pub struct Layer {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// All layers of a file: of one shape, the same number of tokens.
#[derive(Debug, Clone)]
pub struct Capture {
    pub tokens: usize,
    pub layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

impl Capture {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| {
            Error::new(OP, ErrorKind::Io { path: path.display().to_string(), source })
        })?;
        Self::parse(&bytes)
            .map_err(|what| Error::invalid(OP, format!("{}: {what}", path.display())))
    }

    /// Reads the bytes of a file; says what is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or("not a safetensors file")?;
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (header, data) = rest.split_at_checked(length).ok_or("truncated in its header")?;
        let header: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(header).map_err(|e| format!("its header: {e}"))?;
        let tensor = |name: &str| -> Result<Option<Tensor>, String> {
            let Some(entry) = header.get(name) else { return Ok(None) };
            let entry = Entry::deserialize(entry).map_err(|e| format!("{name}: {e}"))?;
            tensor(&entry, data).map(Some).map_err(|what| format!("{name}: {what}"))
        };
        let mut numbers: Vec<usize> = header
            .keys()
            .filter_map(|name| name.strip_prefix("layer")?.strip_suffix(".k")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let mut layers = Vec::new();
        for number in numbers {
            let part = |part: &str| {
                let name = format!("layer{number}.{part}");
                tensor(&name)?.ok_or(format!("there is no {name}"))
            };
            layers.push(Layer { q: part("q")?, k: part("k")?, v: part("v")? });
        }
        let first = layers.first().ok_or("there is no layerN.k, layerN.q, layerN.v")?;
        let (k, tokens) = (&first.k, first.k.tokens());
        for layer in &layers {
            let Layer { q, k: keys, v } = layer;
            let alike = [keys, v].iter().all(|t| (t.heads, t.dtype) == (k.heads, k.dtype))
                && [q, keys, v].iter().all(|t| (t.dim, t.tokens()) == (k.dim, tokens))
                && q.heads % k.heads == 0;
            if !alike {
                return Err("its layers differ in shape, or q, k and v of a layer in tokens, \
                            head_dim or type; query heads are a multiple of KV heads"
                    .into());
            }
        }
        Ok(Self { tokens, layers })
    }

    /// Makes every 16th channel of K an outlier, 40 times as large and shifted by 100, as biases do. Queries shrink
    /// by as much, and softmax sees no shift: attention stays the same but for rounding.
    pub fn add_outliers(&mut self) {
        for layer in &mut self.layers {
            for (tensor, factor, shift) in
                [(&mut layer.k, 40.0, 100.0), (&mut layer.q, 1.0 / 40.0, 0.0)]
            {
                let (dim, dtype) = (tensor.dim, tensor.dtype);
                for element in tensor.elements.iter_mut().skip(5 % dim).step_by(16) {
                    *element = from_f32(dtype, to_f32(dtype, *element) * factor + shift);
                }
            }
        }
    }
}

fn tensor(entry: &Entry, data: &[u8]) -> Result<Tensor, String> {
    let dtype = match entry.dtype.as_str() {
        "BF16" | "U16" => Dtype::Bf16,
        "F16" => Dtype::F16,
        other => return Err(format!("type {other}; BF16, F16 or U16 are read")),
    };
    let [tokens, heads, dim] = entry.shape[..] else {
        return Err(format!("shape {:?}; [token, head, head_dim] is read", entry.shape));
    };
    let [begin, end] = entry.data_offsets;
    let bytes = data.get(begin..end).ok_or("truncated")?;
    let expected = tokens.checked_mul(heads).and_then(|n| n.checked_mul(dim)?.checked_mul(2));
    if expected != Some(bytes.len()) || bytes.is_empty() {
        return Err(format!("{} bytes for the shape {:?}", bytes.len(), entry.shape));
    }
    let elements = bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
    Ok(Tensor { heads, dim, dtype, elements })
}

/// Value of a bit pattern.
pub fn to_f32(dtype: Dtype, bits: u16) -> f32 {
    if dtype == Dtype::F16 { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
}

fn from_f32(dtype: Dtype, x: f32) -> u16 {
    if dtype == Dtype::F16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; data]);
        bytes
    }

    #[test]
    fn only_whole_captures_are_read() {
        let entry = |name: &str, heads: usize, begin: usize, end: usize| {
            format!(
                r#""layer3.{name}":{{"dtype":"U16","shape":[2,{heads},16],"data_offsets":[{begin},{end}]}}"#
            )
        };
        let good = format!(
            "{{{},{},{}}}",
            entry("q", 2, 0, 128),
            entry("k", 1, 128, 192),
            entry("v", 1, 192, 256)
        );
        let capture = Capture::parse(&file(&good, 256)).unwrap();
        assert_eq!((capture.tokens, capture.layers.len(), capture.layers[0].q.heads), (2, 1, 2));
        for (header, data, words) in [
            (good.clone(), 255, "truncated"),
            (good.replace("layer3.v", "layer4.v"), 256, "no layer3.v"),
            (good.replace("[2,1,16]", "[2,16]"), 256, "[token, head, head_dim]"),
            (good.replace("U16", "F32"), 256, "F32"),
            (good.replace("[2,2,16]", "[1,4,16]"), 256, "differ in shape"),
            (good.replace("[2,2,16]", "[0,2,16]"), 256, "bytes for the shape"),
            (good.replace("128,192", "192,128"), 256, "truncated"),
            ("{}".to_owned(), 0, "there is no layerN.k"),
            ("{".to_owned(), 0, "its header"),
        ] {
            let error = Capture::parse(&file(&header, data)).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert!(Capture::parse(b"short").is_err());
        assert!(Capture::parse(&[0xff; 64]).is_err());
    }
}
