//! `raw`: the elements as they are. Holds every block.

use super::{Arrays, Fallback, Format, Geometry, Header, Written};
use crate::error::Result;

pub(super) struct Raw;

impl Format for Raw {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays> {
        Ok(Arrays::new([geometry.raw_bytes()], 0))
    }

    fn encode(&self, _: &Geometry, block: &[u16], payload: &mut [u8]) -> Result<Written, Fallback> {
        for (bytes, element) in payload.chunks_exact_mut(2).zip(block) {
            bytes.copy_from_slice(&element.to_le_bytes());
        }
        Ok(Written::default())
    }

    fn decode(&self, _: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String> {
        for (element, bytes) in block.iter_mut().zip(payload.as_chunks::<2>().0) {
            *element = u16::from_le_bytes(*bytes);
        }
        Ok(())
    }
}
