//! `fp8`: e4m3 floats, scaled so that the largest magnitude of those that share a scale is the largest e4m3.
//!
//! ```text
//! scales  f32                   per token: [plane][token], per head: [plane], per tensor: [layer][K|V]
//! bytes   [plane][token][dim]   the nearest of element / scale (src/e4m3.rs)
//! ```
//!
//! With a scale per token, bytes and scales are those that `append` stores in an e4m3 cache. The absolute error
//! of an element is at most `max(|x| / 16, scale / 1024)`.

use super::pack::{section, sections, sections_mut};
use super::{Arrays, Fallback, Format, Geometry, Header, ScalePer, Written, round};
use crate::e4m3;
use crate::error::Result;

pub(super) struct Fp8(pub ScalePer);

impl Fp8 {
    /// Elements that share a scale, contiguous in a block.
    fn span(&self, geometry: &Geometry) -> usize {
        match self.0 {
            ScalePer::Token => geometry.head_dim(),
            ScalePer::Head => geometry.plane_elements(),
            ScalePer::Tensor => geometry.num_kv_heads() * geometry.plane_elements(),
        }
    }

    fn lengths(&self, geometry: &Geometry) -> [usize; 2] {
        let elements = geometry.elements();
        [section(elements / self.span(geometry) * size_of::<f32>()), elements]
    }
}

impl Format for Fp8 {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays> {
        Ok(Arrays::new(self.lengths(geometry), 1))
    }

    fn encode(
        &self,
        geometry: &Geometry,
        block: &[u16],
        payload: &mut [u8],
    ) -> Result<Written, Fallback> {
        let dtype = geometry.dtype();
        round::require_finite(dtype, block)?;
        let span = self.span(geometry);
        let [scales, bytes] = sections_mut(payload, self.lengths(geometry));
        scales.fill(0);
        let mut values = vec![0.0; span];
        let spans = block.chunks_exact(span).zip(bytes.chunks_exact_mut(span));
        for ((elements, bytes), stored) in spans.zip(scales.chunks_exact_mut(4)) {
            for (value, element) in values.iter_mut().zip(elements) {
                *value = round::to_f32(dtype, *element);
            }
            let scale = e4m3::row_scale(&values);
            e4m3::quantise(&values, scale, bytes);
            stored.copy_from_slice(&scale.to_le_bytes());
        }
        Ok(Written::default())
    }

    fn decode(&self, header: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String> {
        let (geometry, dtype) = (&header.geometry, header.geometry.dtype());
        let span = self.span(geometry);
        let [scales, bytes] = sections(payload, self.lengths(geometry));
        let spans = block.chunks_exact_mut(span).zip(bytes.chunks_exact(span));
        for ((elements, bytes), scale) in spans.zip(scales.as_chunks::<4>().0) {
            let scale = f32::from_le_bytes(*scale);
            for (element, byte) in elements.iter_mut().zip(bytes) {
                *element = round::saturating(dtype, e4m3::to_f32(*byte) * scale);
            }
        }
        Ok(())
    }
}
