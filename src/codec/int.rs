//! `int8`, `int6`, `int4`: integers between the least and the largest of a group, K by channel, V by token.
//!
//! Channels of K differ in magnitude and stay so from token to token: a scale per token loses the small ones
//! beside the large. So a group of K is one channel of up to 64 tokens of the block (KIVI, Liu et al. 2024), a
//! group of V one head of a token. `int4` rotates V first (rotate.rs; QuaRot, Ashkboos et al. 2024).
//!
//! ```text
//! K groups       [K plane][tokens / 64][dim]          zero, step: 16 bits each
//! V groups       [V plane][token]                     likewise
//! int8: bytes    [plane][token][dim]                  q
//! int6: nibbles  [plane][token][dim], pairs likewise  q & 15, q >> 4
//! int4: nibbles  [plane][token][dim]                  q
//! ```
//!
//! `zero` and `step` are of the elements' type: `zero` the least of the group (of K always exact), `step` the
//! distance to the largest over the number of steps, rounded up. An element is `zero + q * step`, so that its
//! error is at most half a step (of V in `int4`: in the rotated space).

use super::pack::{
    pack_high_pairs, pack_nibbles, sections, sections_mut, unpack_high_pairs, unpack_nibbles,
};
use super::rotate::rotate;
use super::{Arrays, Fallback, Format, Geometry, Header, Written, round};
use crate::error::Result;
use crate::layout::Dtype;

/// Integers of this many bits.
pub(crate) struct Int {
    bits: u32,
    rotates_values: bool,
}

pub(super) const INT8: Int = Int { bits: 8, rotates_values: false };
pub(super) const INT6: Int = Int { bits: 6, rotates_values: false };
pub(super) const INT4: Int = Int { bits: 4, rotates_values: true };

/// Most tokens of a group of K.
const GROUP_TOKENS: usize = 64;
/// Bytes of a group's `zero` and `step`.
const AFFINE_BYTES: usize = 4;
/// No rotated value is larger, so that rotating it back overflows nowhere: 2^118, in rows of up to 256.
const LARGEST_ROTATED: f32 = f32::from_bits((127 + 118) << 23);
/// No step is less, so that its inverse is finite: 2^-100.
const LEAST_STEP: f32 = f32::from_bits((127 - 100) << 23);

/// What the codes of a group stand for.
#[derive(Clone, Copy)]
struct Affine {
    zero: f32,
    step: f32,
}

impl Affine {
    /// Of a group between `least` and `largest`, as stored; `None` when that is not finite.
    fn fit(dtype: Dtype, least: f32, largest: f32, levels: f32) -> Option<[u16; 2]> {
        // Adding 0 makes -0 one with 0.
        let zero = round::down(dtype, least + 0.0);
        let range = largest - round::to_f32(dtype, zero);
        let step = round::up(dtype, (range / levels).max(LEAST_STEP));
        let finite = [zero, step].iter().all(|bits| round::is_finite(dtype, *bits));
        finite.then_some([zero, step])
    }

    fn of(dtype: Dtype, [zero, step]: [u16; 2]) -> Self {
        Self { zero: round::to_f32(dtype, zero), step: round::to_f32(dtype, step) }
    }

    fn from_bytes(dtype: Dtype, [a, b, c, d]: [u8; AFFINE_BYTES]) -> Self {
        Self::of(dtype, [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])])
    }

    fn quantise(self, x: f32, levels: f32) -> u8 {
        let inverse = 1.0 / self.step;
        ((x - self.zero) * inverse).round_ties_even().clamp(0.0, levels) as u8
    }

    fn value(self, code: u8) -> f32 {
        self.zero + f32::from(code) * self.step
    }
}

impl Int {
    const fn levels(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Bytes of a plane: of the groups of K, of those of V, of codes without pairs.
    pub(super) fn plane_bytes(&self, geometry: &Geometry) -> [usize; 3] {
        let key_groups = geometry.block_size().div_ceil(GROUP_TOKENS) * geometry.head_dim();
        let codes = geometry.plane_elements() * if self.bits == 8 { 2 } else { 1 } / 2;
        [key_groups * AFFINE_BYTES, geometry.block_size() * AFFINE_BYTES, codes]
    }

    /// Reads a row of 8- or 4-bit codes. `groups` has zero and step of every channel, or those of all: K and V.
    pub(crate) fn read_row(&self, dtype: Dtype, groups: &[u8], codes: &[u8], row: &mut [f64]) {
        let groups = groups.as_chunks::<AFFINE_BYTES>().0;
        let mut bytes = vec![0; row.len()];
        match self.bits {
            8 => bytes.copy_from_slice(codes),
            _ => unpack_nibbles(codes, &mut bytes),
        }
        let mut values: Vec<f32> = (bytes.iter().enumerate())
            .map(|(i, &code)| Affine::from_bytes(dtype, groups[i % groups.len()]).value(code))
            .collect();
        if self.rotates_values && groups.len() == 1 {
            rotate(&mut values);
        }
        row.iter_mut().zip(values).for_each(|(x, value)| *x = value.into());
    }

    /// The group of K that a token of a block belongs to.
    pub(crate) const fn key_group(token: usize) -> usize {
        token / GROUP_TOKENS
    }

    /// Bits of a code.
    pub(crate) const fn bits(&self) -> u32 {
        self.bits
    }

    /// Groups of K, of V; bytes or nibbles, pairs.
    fn lengths(&self, geometry: &Geometry) -> [usize; 4] {
        let planes = geometry.planes();
        let [key_groups, value_groups, codes] = self.plane_bytes(geometry);
        let pairs = if self.bits == 6 { geometry.elements() / 4 } else { 0 };
        [planes / 2 * key_groups, planes / 2 * value_groups, planes * codes, pairs]
    }

    fn pack(&self, plane: usize, codes: &[u8], words: &mut [u8], pairs: &mut [u8]) {
        let n = codes.len();
        if self.bits == 8 {
            words[plane * n..][..n].copy_from_slice(codes);
            return;
        }
        pack_nibbles(codes, &mut words[plane * n / 2..][..n / 2]);
        if self.bits == 6 {
            pack_high_pairs(codes, &mut pairs[plane * n / 4..][..n / 4]);
        }
    }

    fn unpack(&self, plane: usize, words: &[u8], pairs: &[u8], codes: &mut [u8]) {
        let n = codes.len();
        if self.bits == 8 {
            codes.copy_from_slice(&words[plane * n..][..n]);
            return;
        }
        unpack_nibbles(&words[plane * n / 2..][..n / 2], codes);
        if self.bits == 6 {
            unpack_high_pairs(&pairs[plane * n / 4..][..n / 4], codes);
        }
    }
}

/// A plane of K or V in f32, and how its elements fall into groups.
struct Plane<'a> {
    dtype: Dtype,
    dim: usize,
    is_key: bool,
    levels: f32,
    /// Of the values that can be quantised.
    largest: f32,
    values: &'a mut [f32],
}

impl Plane<'_> {
    /// The group of an element.
    fn group(&self, position: usize) -> usize {
        let (token, channel) = (position / self.dim, position % self.dim);
        if self.is_key { token / GROUP_TOKENS * self.dim + channel } else { token }
    }

    /// Fits every group and writes the codes of the elements.
    fn quantise(&self, groups: &mut [u8], codes: &mut [u8]) -> Result<(), Fallback> {
        let mut bounds = vec![(f32::INFINITY, f32::NEG_INFINITY); groups.len() / AFFINE_BYTES];
        for (position, &x) in self.values.iter().enumerate() {
            if x.is_nan() || x.abs() > self.largest {
                return Err(Fallback::NotFinite);
            }
            let (least, largest) = &mut bounds[self.group(position)];
            *least = least.min(x);
            *largest = largest.max(x);
        }
        let mut affines = Vec::with_capacity(bounds.len());
        for ((least, largest), stored) in
            bounds.into_iter().zip(groups.as_chunks_mut::<AFFINE_BYTES>().0)
        {
            let bits =
                Affine::fit(self.dtype, least, largest, self.levels).ok_or(Fallback::NotFinite)?;
            let [[a, b], [c, d]] = bits.map(u16::to_le_bytes);
            *stored = [a, b, c, d];
            affines.push(Affine::of(self.dtype, bits));
        }
        for (position, (code, &x)) in codes.iter_mut().zip(self.values.iter()).enumerate() {
            *code = affines[self.group(position)].quantise(x, self.levels);
        }
        Ok(())
    }

    /// Writes the values of the elements.
    fn restore(&mut self, groups: &[u8], codes: &[u8]) {
        let stored = groups.as_chunks::<AFFINE_BYTES>().0;
        for (position, &code) in codes.iter().enumerate() {
            let affine = Affine::from_bytes(self.dtype, stored[self.group(position)]);
            self.values[position] = affine.value(code);
        }
    }

    fn rotate(&mut self) {
        self.values.chunks_exact_mut(self.dim).for_each(rotate);
    }
}

impl Format for Int {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays> {
        Ok(Arrays::new(self.lengths(geometry), 2))
    }

    fn encode(
        &self,
        geometry: &Geometry,
        block: &[u16],
        payload: &mut [u8],
    ) -> Result<Written, Fallback> {
        let dtype = geometry.dtype();
        round::require_finite(dtype, block)?;
        let lengths = self.lengths(geometry);
        let [key_groups, value_groups, words, pairs] = sections_mut(payload, lengths);
        let per_plane = geometry.planes() / 2;
        let mut values = vec![0.0; geometry.plane_elements()];
        let mut codes = vec![0; geometry.plane_elements()];
        for (index, elements) in block.chunks_exact(geometry.plane_elements()).enumerate() {
            for (value, element) in values.iter_mut().zip(elements) {
                *value = round::to_f32(dtype, *element);
            }
            let is_key = geometry.is_key(index);
            let (groups, length) = if is_key {
                (&mut *key_groups, lengths[0] / per_plane)
            } else {
                (&mut *value_groups, lengths[1] / per_plane)
            };
            let groups = &mut groups[geometry.index_in_kind(index) * length..][..length];
            let (dim, levels) = (geometry.head_dim(), self.levels());
            let mut plane =
                Plane { dtype, dim, is_key, levels, largest: f32::MAX, values: &mut values };
            if self.rotates_values && !is_key {
                plane.rotate();
                plane.largest = LARGEST_ROTATED;
            }
            plane.quantise(groups, &mut codes)?;
            self.pack(index, &codes, words, pairs);
        }
        Ok(Written::default())
    }

    fn decode(&self, header: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String> {
        let (geometry, dtype) = (&header.geometry, header.geometry.dtype());
        let lengths = self.lengths(geometry);
        let [key_groups, value_groups, words, pairs] = sections(payload, lengths);
        let per_plane = geometry.planes() / 2;
        let mut values = vec![0.0; geometry.plane_elements()];
        let mut codes = vec![0; geometry.plane_elements()];
        for (index, elements) in block.chunks_exact_mut(geometry.plane_elements()).enumerate() {
            let is_key = geometry.is_key(index);
            let (groups, length) = if is_key {
                (key_groups, lengths[0] / per_plane)
            } else {
                (value_groups, lengths[1] / per_plane)
            };
            let groups = &groups[geometry.index_in_kind(index) * length..][..length];
            self.unpack(index, words, pairs, &mut codes);
            let (dim, levels) = (geometry.head_dim(), self.levels());
            let mut plane =
                Plane { dtype, dim, is_key, levels, largest: f32::MAX, values: &mut values };
            plane.restore(groups, &codes);
            if self.rotates_values && !is_key {
                plane.rotate();
            }
            for (element, value) in elements.iter_mut().zip(&values) {
                *element = round::saturating(dtype, *value);
            }
        }
        Ok(())
    }
}
