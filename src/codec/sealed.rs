//! Slots that attention reads where they lie: `int8` and `int4` in device memory.

use super::int::{self, Int};
use super::{Codec, Geometry, OP};
use crate::error::{Error, Result};

/// Where one layer of a block lies in a slot: bytes from the start of the slot to the layer's first head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPlaces {
    /// Zeros and steps of K: `[head][64 tokens][channel]`, 4 bytes each.
    pub key_groups: u64,
    /// Zeros and steps of V: `[head][token]`, 4 bytes each.
    pub value_groups: u64,
    /// Codes of K: `[head][token][channel]`.
    pub keys: u64,
    /// Codes of V, likewise.
    pub values: u64,
}

impl Codec {
    /// The integers of a codec that attention reads where it lies.
    pub(crate) const fn attended(self) -> Option<&'static Int> {
        match self {
            Self::Int8 => Some(&int::INT8),
            Self::Int4 => Some(&int::INT4),
            _ => None,
        }
    }

    /// Where a layer lies in a slot of this geometry.
    ///
    /// # Errors
    /// `Unsupported` for a codec other than `int8` and `int4`, `InvalidArgument` for a layer that the geometry
    /// does not have.
    pub fn layer_places(self, geometry: &Geometry, layer: u32) -> Result<LayerPlaces> {
        let Some(int) = self.attended() else {
            return Err(Error::unsupported(OP, "codec of attended blocks", self, "int8, int4"));
        };
        if layer as usize >= geometry.layers() {
            return Err(Error::invalid(OP, format!("layer {layer} of a slot of {geometry}")));
        }
        let offsets = self.slot_layout(geometry)?.offsets.map(u64::from);
        let (layer, heads) = (u64::from(layer), geometry.num_kv_heads() as u64);
        let [key_groups, value_groups, codes] = int.plane_bytes(geometry).map(|bytes| bytes as u64);
        let keys = offsets[2] + 2 * layer * heads * codes;
        Ok(LayerPlaces {
            key_groups: offsets[0] + layer * heads * key_groups,
            value_groups: offsets[1] + layer * heads * value_groups,
            keys,
            values: keys + heads * codes,
        })
    }
}
