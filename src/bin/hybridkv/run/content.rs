//! What the rows of queries, keys and values of a run are: numbers that follow from the token history, and how the
//! pool holds them.

use half::{bf16, f16};
use hybridkv::device::{Device, DeviceBuffer, Span};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::{Dtype, KvScales, KvStrides, KvView};
use hybridkv::ops::synthetic::{Distribution, Tensor};
use hybridkv::spec::LayerGroup;

/// Which keys and values of 8 bits share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scales {
    /// Every token of every head has its own, computed as it is stored; it lies in the block, and moves with it.
    Token,
    /// Every head of every layer has one, which is known before.
    Head,
}

/// The element types of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elements {
    /// Of queries, outputs and new keys and values: bf16 or f16.
    pub dtype: Dtype,
    /// How keys and values are held in 8 bits; `None`: as they are.
    pub scales: Option<Scales>,
}

impl Elements {
    /// The type of keys and values in the pool.
    pub fn kv_dtype(&self) -> Dtype {
        if self.scales.is_some() { Dtype::E4m3 } else { self.dtype }
    }

    /// The type of keys and values, and which of them share a scale, in words.
    pub fn describe_kv(&self) -> String {
        let scales = match self.scales {
            None => "",
            Some(Scales::Token) => " (a scale per token and head)",
            Some(Scales::Head) => " (a scale per head)",
        };
        format!("{}{scales}", self.kv_dtype().name())
    }

    /// Largest relative 2-norm error of one output row: twice what is allowed for a whole tensor
    /// (docs/numerics.md), because a row does not average over the others.
    pub fn row_tolerance(&self) -> f64 {
        match (self.dtype, self.scales) {
            (Dtype::F16, None) => 1e-3,
            (Dtype::F16, Some(_)) => 6e-3,
            (_, None) => 8e-3,
            (_, Some(_)) => 1e-2,
        }
    }
}

/// One head of a token's keys or values, as the pool holds it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// The elements.
    pub bytes: Vec<u8>,
    /// The scale that lies in the block beside them.
    pub scale: Option<f32>,
}

/// Rows of every kind.
pub struct Content {
    elements: Elements,
    distribution: Distribution,
    /// Largest magnitudes of keys and of values.
    largest: [f32; 2],
}

impl Content {
    pub fn new(elements: Elements) -> Result<Self> {
        let distribution = Distribution::embedded(elements.dtype)?;
        let all = distribution.elements();
        let third = all.len() / 3;
        let largest = [Tensor::K, Tensor::V].map(|tensor| {
            let rows = &all[tensor as usize * third..(tensor as usize + 1) * third];
            let numbers = rows.iter().map(|&bits| decode(elements.dtype, bits).abs() as f32);
            numbers.fold(0.0, f32::max)
        });
        Ok(Self { elements, distribution, largest })
    }

    pub fn elements(&self) -> Elements {
        self.elements
    }

    /// What the kernel that makes the rows draws from.
    pub fn distribution(&self) -> &Distribution {
        &self.distribution
    }

    /// The scale of a head of a layer where its tokens share one: enough for every number that can occur, and not
    /// the same as its neighbours'.
    fn head_scale(&self, layer: u32, tensor: Tensor, head: u32) -> f32 {
        let margin = 1.0 + ((3 * layer + head) % 8) as f32 / 8.0;
        self.largest[usize::from(tensor == Tensor::V)] / e4m3::MAX * margin
    }

    /// A native view of a group, with the scales that its tokens share and the memory that holds them, if they do.
    pub fn view(
        &self,
        device: &Device,
        group: &LayerGroup,
        native: KvView,
    ) -> Result<(KvView, Option<DeviceBuffer>)> {
        if self.elements.scales != Some(Scales::Head) {
            return Ok((native, None));
        }
        let heads = group.shape.num_kv_heads;
        let of = |tensor| -> Vec<f32> {
            let layers = group.layers.iter();
            layers
                .flat_map(|&layer| (0..heads).map(move |head| self.head_scale(layer, tensor, head)))
                .collect()
        };
        let (keys, values) = (of(Tensor::K), of(Tensor::V));
        let scales = device.upload(&[keys, values].concat())?;
        let half = scales.len() as u64 / 2;
        let view = native.with_scales(KvScales {
            k: Span::new(scales.address(), half),
            v: Span::new(scales.address() + half, half),
            strides: KvStrides { layer: heads.into(), head: 1, ..KvStrides::NONE },
        })?;
        Ok((view, Some(scales)))
    }

    /// One head of a query, as numbers.
    pub fn query(&self, hash: u64, layer: u32, head: u32, dim: usize) -> Vec<f64> {
        self.drawn(hash, layer, Tensor::Q, head, dim)
    }

    /// One head of a token's keys or values, as the pool must hold it.
    pub fn row(&self, hash: u64, layer: u32, tensor: Tensor, head: u32, dim: usize) -> Row {
        let Some(scales) = self.elements.scales else {
            let mut bits = vec![0u16; dim];
            self.distribution.fill(hash, layer, tensor, head, &mut bits);
            return Row { bytes: bytemuck::cast_slice(&bits).to_vec(), scale: None };
        };
        let row: Vec<f32> =
            self.drawn(hash, layer, tensor, head, dim).iter().map(|&x| x as f32).collect();
        let (scale, own) = match scales {
            Scales::Token => (e4m3::row_scale(&row), true),
            Scales::Head => (self.head_scale(layer, tensor, head), false),
        };
        let mut bytes = vec![0; dim];
        e4m3::quantise(&row, scale, &mut bytes);
        Row { bytes, scale: own.then_some(scale) }
    }

    /// The numbers for which such a row stands.
    pub fn numbers(
        &self,
        hash: u64,
        layer: u32,
        tensor: Tensor,
        head: u32,
        dim: usize,
    ) -> Vec<f64> {
        if self.elements.scales.is_none() {
            return self.drawn(hash, layer, tensor, head, dim);
        }
        let row = self.row(hash, layer, tensor, head, dim);
        let scale = row.scale.unwrap_or_else(|| self.head_scale(layer, tensor, head));
        row.bytes.iter().map(|&bits| f64::from(e4m3::to_f32(bits)) * f64::from(scale)).collect()
    }

    /// The numbers as they are drawn.
    fn drawn(&self, hash: u64, layer: u32, tensor: Tensor, head: u32, dim: usize) -> Vec<f64> {
        let mut bits = vec![0u16; dim];
        self.distribution.fill(hash, layer, tensor, head, &mut bits);
        bits.iter().map(|&bits| decode(self.elements.dtype, bits)).collect()
    }
}

/// The number for which 16 bits stand.
pub fn decode(dtype: Dtype, bits: u16) -> f64 {
    match dtype {
        Dtype::F16 => f16::from_bits(bits).to_f64(),
        _ => bf16::from_bits(bits).to_f64(),
    }
}
