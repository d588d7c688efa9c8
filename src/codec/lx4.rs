//! `lx4`: every bit of bf16 elements, in 12.2 bits.
//!
//! The exponents of a KV cache have 2.6 to 3.0 bits of entropy, the other 8 bits of an element next to 8. So
//! sign and mantissa stay as they are, and an exponent becomes a 4-bit code of where it lies in a window
//! of 15 below the largest of its channel, which is where all but 0.01 to 0.02 % of the elements of real
//! keys and values are. Code 0 marks the others, whose exponents are listed.
//!
//! ```text
//! bases      [plane] u8              the largest exponent of the plane
//! ends       [plane] u16             escapes of this plane and those before it
//! offsets    [K plane][dim] nibble   base - window; V has window = base
//! positions  [escape] u16            token * head_dim + dim, ascending in a plane
//! exponents  [escape] u8
//! bytes      [plane][token][dim]     sign << 7 | mantissa
//! nibbles    [plane][token][dim]     0, or exponent + 15 - window, window of the channel
//! ```
//!
//! An escape is found by a binary search of its plane's positions: elements decode in any order.
//!
//! Of the 5 exponent bits of f16 a window would save one in 16 and lose most of it to the lists, so f16 is not
//! supported.

use super::pack::{pack_nibbles, section, sections, sections_mut, unpack_nibbles};
use super::window::{Windows, element_of, exponent, join, lowest};
use super::{Arrays, Fallback, Format, Geometry, Header, OP, Written};
use crate::error::{Error, Result};
use crate::layout::Dtype;

pub(super) struct Lx4;

/// One escape in so many elements has room.
const ELEMENTS_PER_ESCAPE: usize = 768;

/// Escapes that a slot lists, a multiple of 16 that `ends` can count.
pub(super) fn capacity(geometry: &Geometry) -> usize {
    geometry.elements().div_ceil(ELEMENTS_PER_ESCAPE).next_multiple_of(16).min(65_520)
}

fn lengths(geometry: &Geometry) -> [usize; 7] {
    let (planes, elements, capacity) = (geometry.planes(), geometry.elements(), capacity(geometry));
    [
        section(planes),
        section(2 * planes),
        section(planes / 2 * geometry.head_dim() / 2),
        2 * capacity,
        capacity,
        elements,
        elements / 2,
    ]
}

impl Format for Lx4 {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays> {
        match geometry.dtype() {
            Dtype::Bf16 => Ok(Arrays::new(lengths(geometry), 5)),
            dtype => Err(Error::unsupported(OP, "lx4 of", dtype.name(), "bf16")),
        }
    }

    fn encode(
        &self,
        geometry: &Geometry,
        block: &[u16],
        payload: &mut [u8],
    ) -> Result<Written, Fallback> {
        let (dim, plane_elements) = (geometry.head_dim(), geometry.plane_elements());
        let capacity = capacity(geometry);
        let [bases, ends, offsets, positions, exponents, bytes, nibbles] =
            sections_mut(payload, lengths(geometry));
        // What lies between the last entry of a table and the next section.
        for table in [&mut *bases, &mut *ends, &mut *offsets, &mut *positions, &mut *exponents] {
            table.fill(0);
        }
        let mut codes = vec![0; plane_elements];
        let mut escapes = 0;
        for (index, plane) in block.chunks_exact(plane_elements).enumerate() {
            let windows = Windows::of(plane, dim, geometry.is_key(index));
            bases[index] = windows.base;
            if geometry.is_key(index) {
                let row = geometry.index_in_kind(index) * dim / 2;
                pack_nibbles(&windows.below, &mut offsets[row..row + dim / 2]);
            }
            let first = index * plane_elements;
            windows.split(plane, &mut codes, &mut bytes[first..first + plane_elements]);
            pack_nibbles(&codes, &mut nibbles[first / 2..][..plane_elements / 2]);
            for (position, _) in codes.iter().enumerate().filter(|(_, code)| **code == 0) {
                if escapes < capacity {
                    positions[2 * escapes..][..2].copy_from_slice(&(position as u16).to_le_bytes());
                    exponents[escapes] = exponent(plane[position]);
                }
                escapes += 1;
            }
            ends[2 * index..][..2].copy_from_slice(&(escapes.min(capacity) as u16).to_le_bytes());
        }
        if escapes > capacity {
            return Err(Fallback::Escapes { needed: escapes, capacity });
        }
        Ok(Written { unused: 0, escapes: escapes as u32 })
    }

    fn decode(&self, header: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String> {
        let geometry = &header.geometry;
        let (dim, plane_elements) = (geometry.head_dim(), geometry.plane_elements());
        let slot = Slot::new(header, payload)?;
        let mut codes = vec![0; plane_elements];
        let mut windows = vec![0; dim];
        for (index, plane) in block.chunks_exact_mut(plane_elements).enumerate() {
            slot.codes(index, &mut codes);
            windows.fill(0);
            if geometry.is_key(index) {
                let row = geometry.index_in_kind(index) * dim / 2;
                unpack_nibbles(&slot.offsets[row..row + dim / 2], &mut windows);
            }
            windows.iter_mut().for_each(|window| *window = lowest(slot.bases[index], *window));
            let bytes = &slot.bytes[index * plane_elements..][..plane_elements];
            join(&windows, &codes, bytes, plane);
            for (position, exponent) in slot.escapes(index) {
                plane[position] = element_of(bytes[position], exponent);
            }
        }
        Ok(())
    }
}

/// The sections of a payload whose list names exactly the elements of code 0.
struct Slot<'a> {
    bytes: &'a [u8],
    nibbles: &'a [u8],
    bases: &'a [u8],
    ends: &'a [u8],
    offsets: &'a [u8],
    positions: &'a [u8],
    exponents: &'a [u8],
    plane_elements: usize,
}

impl<'a> Slot<'a> {
    fn new(header: &Header, payload: &'a [u8]) -> Result<Self, String> {
        let geometry = &header.geometry;
        let [bases, ends, offsets, positions, exponents, bytes, nibbles] =
            sections(payload, lengths(geometry));
        let plane_elements = geometry.plane_elements();
        let slot =
            Self { bytes, nibbles, bases, ends, offsets, positions, exponents, plane_elements };
        let planes = geometry.planes();
        let mut before = 0;
        for end in (0..planes).map(|plane| slot.end(plane)) {
            if end < before || end > exponents.len() {
                return Err("the numbers of escapes do not add up".into());
            }
            before = end;
        }
        if before != header.escapes as usize {
            return Err(format!("{before} escapes, the header says {}", header.escapes));
        }
        let mut codes = vec![0; plane_elements];
        for plane in 0..planes {
            slot.codes(plane, &mut codes);
            let marked = codes.iter().enumerate().filter(|(_, code)| **code == 0);
            if !marked.map(|(position, _)| position).eq(slot.escapes(plane).map(|(at, _)| at)) {
                return Err(format!("the escapes of plane {plane} are not those of its codes"));
            }
        }
        Ok(slot)
    }

    fn codes(&self, plane: usize, codes: &mut [u8]) {
        let half = self.plane_elements / 2;
        unpack_nibbles(&self.nibbles[plane * half..][..half], codes);
    }

    fn end(&self, plane: usize) -> usize {
        usize::from(u16::from_le_bytes([self.ends[2 * plane], self.ends[2 * plane + 1]]))
    }

    /// Positions in a plane, and exponents.
    fn escapes(&self, plane: usize) -> impl Iterator<Item = (usize, u8)> {
        let first = plane.checked_sub(1).map_or(0, |before| self.end(before));
        (first..self.end(plane)).map(|i| {
            let position = u16::from_le_bytes([self.positions[2 * i], self.positions[2 * i + 1]]);
            (usize::from(position), self.exponents[i])
        })
    }
}
