//! `lxe`: every bit of bf16 elements, in about 10.7 bits. For storage: slots of one geometry differ in size, and the
//! CPU alone reads them.
//!
//! The planes are those of `lx4`: sign and mantissa as they are, and the exponent's place in the window of its
//! channel. The places have 2.3 to 2.8 bits of entropy, not 4, and how they are distributed differs little from
//! model to model: so they are written with one of a few fixed prefix codes, whichever is the shortest for the
//! plane. No code is trained, none is stored, and a slot stands alone. The escapes, as many as there are, follow
//! in the order in which they are found.
//!
//! ```text
//! bases      [plane] u8            as lx4 has them
//! codes      [plane] u8            the prefix code of the plane; one more for the offsets
//! lengths    [plane] u16           bytes of the plane's stream
//! bytes      [plane][token][dim]   sign << 7 | mantissa
//! streams    of each plane, [token][dim], the codes of `Windows`
//!            exponents of the escapes, u8, in the order of the streams
//!            offsets of K, [K plane][dim]
//!            zeros up to 8 bytes and more behind the last stream, so that all can be read in words
//! ```
//!
//! Planes stand in the order K of all layers, then V of all layers: neighbours have streams of about one length,
//! and [`LANES`] of them are decoded side by side. A stream begins with the lowest bit of its first byte.
//!
//! Reading prefix codes by table, several symbols at a time and several streams side by side, is what Zstandard's
//! Huffman decoder does (Collet; github.com/facebook/zstd).

use std::sync::LazyLock;

use super::pack::{section, sections, sections_mut};
use super::window::{Windows, element_of, exponent, join, lowest};
use super::{Arrays, Fallback, Format, Geometry, Header, OP, Written};
use crate::error::{Error, Result};
use crate::layout::Dtype;

pub(super) struct Lxe;

/// How far the window of a channel lies below the base at most; offsets are written as what is left of it, so that
/// those that are likely are the same symbols as of exponents.
const WIDEST: u8 = 15;
/// Symbols of a prefix code: 0 an escape, 15 the window's upper end.
const SYMBOLS: usize = 16;
/// Bits of the longest codeword.
const LONGEST: u32 = 10;
/// Bits of the codeword of each symbol. The shortest that package-merge gives for the distributions of real keys
/// and values, as they are and with outlier channels, and of normal and Student's t deviates, in blocks of 8 to
/// 128 tokens; chosen such that of any plane the best of them is as short as possible. The last one takes what
/// none of the others expects, and no more than `lx4` does.
const LENGTHS: [[u8; SYMBOLS]; 12] = [
    [10, 10, 10, 10, 10, 10, 10, 10, 8, 8, 6, 5, 4, 3, 2, 1],
    [10, 10, 10, 10, 10, 10, 10, 10, 8, 8, 6, 5, 4, 3, 1, 2],
    [10, 10, 10, 10, 10, 10, 9, 8, 8, 6, 5, 4, 3, 2, 2, 2],
    [10, 10, 10, 10, 10, 10, 9, 7, 6, 5, 4, 4, 2, 2, 2, 4],
    [9, 9, 10, 10, 10, 10, 10, 10, 9, 8, 6, 4, 2, 1, 3, 5],
    [10, 10, 10, 10, 10, 10, 7, 3, 2, 1, 4, 7, 10, 10, 7, 5],
    [10, 10, 10, 10, 9, 9, 7, 6, 6, 4, 3, 3, 2, 2, 3, 6],
    [10, 10, 10, 10, 8, 8, 6, 6, 4, 3, 3, 2, 2, 3, 6, 8],
    [10, 10, 10, 10, 9, 8, 8, 6, 5, 5, 3, 2, 2, 2, 5, 9],
    [10, 10, 10, 10, 9, 7, 7, 5, 5, 3, 2, 2, 2, 5, 7, 9],
    [10, 10, 10, 9, 7, 6, 6, 4, 4, 2, 2, 2, 4, 6, 9, 10],
    [4; SYMBOLS],
];

/// Streams that are decoded side by side: one waits for its table while the others' symbols are stored.
const LANES: usize = 4;
/// Most symbols of one look-up.
const MOST: usize = 6;
/// Look-ups of the bits that one load is sure to have, 57.
const LOOKUPS: usize = 5;
/// Symbols that are searched for escapes together.
const RUN: usize = 64;
/// What a lane may write beyond its symbols.
const SLACK: usize = 40;

/// A prefix code, to write and to read.
struct Prefix {
    lengths: [u8; SYMBOLS],
    /// The first bit of a codeword is the lowest.
    words: [u16; SYMBOLS],
    /// By the next bits of a stream, what they begin with: up to [`MOST`] symbols, a byte each, then their number,
    /// then their bits.
    entries: Box<[u64; 1 << LONGEST]>,
}

static PREFIXES: LazyLock<[Prefix; LENGTHS.len()]> = LazyLock::new(|| LENGTHS.map(Prefix::new));

impl Prefix {
    /// The canonical code of these lengths.
    fn new(lengths: [u8; SYMBOLS]) -> Self {
        let mut order: [usize; SYMBOLS] = std::array::from_fn(|symbol| symbol);
        order.sort_by_key(|symbol| lengths[*symbol]);
        let mut words = [0; SYMBOLS];
        // The next codeword, its first bit the highest of 16.
        let mut next = 0u16;
        for symbol in order {
            words[symbol] = next.reverse_bits();
            next = next.wrapping_add(1 << (16 - lengths[symbol]));
        }
        let mut prefix = Self { lengths, words, entries: Box::new([0; 1 << LONGEST]) };
        for bits in 0..1 << LONGEST {
            prefix.entries[bits] = prefix.entry(bits);
        }
        prefix
    }

    fn entry(&self, bits: usize) -> u64 {
        let (mut symbols, mut count, mut used) = (0, 0, 0);
        while count < MOST {
            let starts = |symbol: &usize| {
                let length = u32::from(self.lengths[*symbol]);
                let rest = bits >> used;
                used + length <= LONGEST
                    && rest & ((1 << length) - 1) == usize::from(self.words[*symbol])
            };
            let Some(symbol) = (0..SYMBOLS).find(starts) else { break };
            symbols |= (symbol as u64) << (8 * count);
            used += u32::from(self.lengths[symbol]);
            count += 1;
        }
        symbols | (count as u64) << 48 | u64::from(used) << 56
    }

    /// Bits of so many of each symbol.
    fn bits(&self, counts: &[u32; SYMBOLS]) -> usize {
        counts.iter().zip(self.lengths).map(|(n, length)| *n as usize * usize::from(length)).sum()
    }

    /// Writes symbols into a stream of the bytes that they take.
    fn write(&self, symbols: &[u8], stream: &mut [u8]) {
        let (mut bits, mut held) = (0u64, 0);
        let mut at = 0;
        for symbol in symbols {
            let symbol = usize::from(*symbol) % SYMBOLS;
            bits |= u64::from(self.words[symbol]) << held;
            held += u32::from(self.lengths[symbol]);
            if held >= 32 {
                stream[at..at + 4].copy_from_slice(&(bits as u32).to_le_bytes());
                (bits, held, at) = (bits >> 32, held - 32, at + 4);
            }
        }
        for (byte, held) in stream[at..].iter_mut().zip(bits.to_le_bytes()) {
            *byte = held;
        }
    }
}

/// The streams of a slot that is being written.
struct Streams<'a> {
    bytes: &'a mut [u8],
    /// Bytes that are taken; those that found no room count.
    end: usize,
}

impl Streams<'_> {
    fn take(&mut self, bytes: usize) -> Option<&mut [u8]> {
        let begin = self.end;
        self.end += bytes;
        self.bytes.get_mut(begin..self.end)
    }

    /// Writes symbols with the prefix code that is the shortest for them; gives it and the bytes.
    fn write(&mut self, symbols: &[u8]) -> (u8, usize) {
        let (code, bytes) = shortest(symbols);
        if let Some(stream) = self.take(bytes) {
            PREFIXES[code].write(symbols, stream);
        }
        (code as u8, bytes)
    }
}

/// The number of the prefix code that takes the fewest bytes for these symbols, and the bytes.
fn shortest(symbols: &[u8]) -> (usize, usize) {
    let mut counts = [0; SYMBOLS];
    for symbol in symbols {
        counts[usize::from(*symbol) % SYMBOLS] += 1;
    }
    let bits = PREFIXES.iter().map(|prefix| prefix.bits(&counts));
    let (code, bits) = bits.enumerate().min_by_key(|(_, bits)| *bits).unwrap_or((0, usize::MAX));
    (code, bits.div_ceil(8))
}

/// Where the symbols of a stream go.
struct Row<'a> {
    bytes: &'a mut [u8],
    done: usize,
    /// Stands in for what a row lacks that is too short for `SLACK`.
    spare: [u8; SLACK],
}

impl Row<'_> {
    fn rest(&mut self) -> &mut [u8; SLACK] {
        let rest = self.bytes.get_mut(self.done..);
        rest.and_then(|rest| rest.first_chunk_mut()).unwrap_or(&mut self.spare)
    }
}

/// Reads `count` symbols of each stream, which begins at a byte of `streams`, into a row of its own of `count + SLACK`
/// bytes. Streams may overlap, and all bits are some symbol.
fn read<const N: usize>(
    prefixes: [&Prefix; N],
    streams: &[u8],
    starts: [usize; N],
    count: usize,
    rows: [&mut [u8]; N],
) {
    let entries = prefixes.map(|prefix| &*prefix.entries);
    let mut rows = rows.map(|bytes| Row { bytes, done: 0, spare: [0; SLACK] });
    // Bits of `streams`.
    let mut at = starts.map(|start| 8 * start);
    while rows.iter().any(|row| row.done < count) {
        let mut bits: [u64; N] =
            std::array::from_fn(|lane| load(streams, at[lane] / 8) >> (at[lane] % 8));
        // Symbols of these bits.
        let mut new = [0; N];
        let rests = rows.each_mut().map(Row::rest);
        for _ in 0..LOOKUPS {
            for lane in 0..N {
                let entry = entries[lane][bits[lane] as usize % (1 << LONGEST)];
                // At most MOST * (LOOKUPS - 1) are there, which is below 32.
                rests[lane][new[lane] % 32..][..8].copy_from_slice(&entry.to_le_bytes());
                let used = entry >> 56;
                bits[lane] >>= used;
                at[lane] += used as usize;
                new[lane] += (entry >> 48) as usize & 0xff;
            }
        }
        for (row, new) in rows.iter_mut().zip(new) {
            // A lane that has all of its symbols goes on behind them.
            row.done = (row.done + new).min(count);
        }
    }
}

/// 8 bytes, little endian; 0 where there are fewer, which is behind all streams.
fn load(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

fn lengths(geometry: &Geometry) -> [usize; 5] {
    let (planes, elements) = (geometry.planes(), geometry.elements());
    [section(planes), section(planes + 1), section(2 * planes), elements, section(elements / 2)]
}

/// The planes of a block in the order in which a slot has them.
fn planes(geometry: &Geometry) -> impl Iterator<Item = usize> + Clone {
    let of_kind = move |keys| (0..geometry.planes()).filter(move |p| geometry.is_key(*p) == keys);
    of_kind(true).chain(of_kind(false))
}

impl Format for Lxe {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays> {
        match geometry.dtype() {
            Dtype::Bf16 => Ok(Arrays::new(lengths(geometry), 3)),
            dtype => Err(Error::unsupported(OP, "lxe of", dtype.name(), "bf16")),
        }
    }

    fn variable_bytes(&self, geometry: &Geometry) -> usize {
        section(geometry.elements() / 2)
    }

    fn encode(
        &self,
        geometry: &Geometry,
        block: &[u16],
        payload: &mut [u8],
    ) -> Result<Written, Fallback> {
        let (dim, plane_elements) = (geometry.head_dim(), geometry.plane_elements());
        let [bases, codes, lengths, bytes, streams] = sections_mut(payload, lengths(geometry));
        for table in [&mut *bases, &mut *codes, &mut *lengths] {
            table.fill(0);
        }
        let mut streams = Streams { bytes: streams, end: 0 };
        let mut symbols = vec![0; plane_elements];
        let (mut escapes, mut offsets) = (Vec::new(), Vec::new());
        for (index, plane) in planes(geometry).enumerate() {
            let elements = &block[plane * plane_elements..][..plane_elements];
            let windows = Windows::of(elements, dim, geometry.is_key(plane));
            let bytes = &mut bytes[index * plane_elements..][..plane_elements];
            windows.split(elements, &mut symbols, bytes);
            bases[index] = windows.base;
            if geometry.is_key(plane) {
                offsets.extend(windows.below.iter().map(|below| WIDEST - below));
            }
            let escaped = symbols.iter().zip(elements).filter(|(symbol, _)| **symbol == 0);
            escapes.extend(escaped.map(|(_, element)| exponent(*element)));
            let (code, length) = streams.write(&symbols);
            codes[index] = code;
            lengths[2 * index..][..2].copy_from_slice(&(length as u16).to_le_bytes());
        }
        if let Some(bytes) = streams.take(escapes.len()) {
            bytes.copy_from_slice(&escapes);
        }
        (codes[geometry.planes()], _) = streams.write(&offsets);
        let (end, capacity) = (streams.end, streams.bytes.len());
        let used = section(end + size_of::<u64>());
        let Some(zeros) = streams.bytes.get_mut(end..used) else {
            return Err(Fallback::Streams { needed: used, capacity });
        };
        zeros.fill(0);
        Ok(Written { unused: capacity - used, escapes: escapes.len() as u32 })
    }

    fn decode(&self, header: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String> {
        let geometry = &header.geometry;
        let (dim, plane_elements) = (geometry.head_dim(), geometry.plane_elements());
        let [bases, codes, lengths, bytes, streams] = sections(payload, lengths(geometry));
        let prefix = |index: usize| {
            let code = codes[index];
            PREFIXES.get(usize::from(code)).ok_or_else(|| format!("there is no prefix code {code}"))
        };
        let order: Vec<usize> = planes(geometry).collect();
        let mut prefixes = Vec::with_capacity(order.len());
        let mut starts = Vec::with_capacity(order.len());
        let mut end = 0;
        for (index, length) in lengths.as_chunks::<2>().0[..order.len()].iter().enumerate() {
            prefixes.push(prefix(index)?);
            starts.push(end);
            end += usize::from(u16::from_le_bytes(*length));
        }
        let escapes = streams.get(end..).and_then(|rest| rest.get(..header.escapes as usize));
        let Some(escapes) = escapes else {
            return Err("the streams are longer than the slot".into());
        };
        let mut escapes = escapes.iter();
        let num_offsets = order.len() / 2 * dim;
        let mut offsets = vec![0; num_offsets + SLACK];
        let start = end + header.escapes as usize;
        read([prefix(order.len())?], streams, [start], num_offsets, [&mut offsets]);

        let stride = plane_elements + SLACK;
        let mut symbols = vec![0; LANES * stride];
        let mut windows = vec![0; dim];
        for first in (0..order.len()).step_by(LANES) {
            // Lanes that are left over read the last plane again.
            let plane = |lane: usize| (first + lane).min(order.len() - 1);
            let mut rows = symbols.chunks_exact_mut(stride);
            read::<LANES>(
                std::array::from_fn(|lane| prefixes[plane(lane)]),
                streams,
                std::array::from_fn(|lane| starts[plane(lane)]),
                plane_elements,
                std::array::from_fn(|_| rows.next().unwrap_or_default()),
            );
            let rows = symbols.chunks_exact(stride).zip(first..order.len());
            for (row, index) in rows {
                let symbols = &row[..plane_elements];
                let base = bases[index];
                windows.fill(lowest(base, 0));
                if let Some(offsets) = offsets[..num_offsets].chunks_exact(dim).nth(index) {
                    for (window, offset) in windows.iter_mut().zip(offsets) {
                        *window = lowest(base, WIDEST - offset);
                    }
                }
                let bytes = &bytes[index * plane_elements..][..plane_elements];
                let elements = &mut block[order[index] * plane_elements..][..plane_elements];
                join(&windows, symbols, bytes, elements);
                for (run, symbols) in symbols.chunks(RUN).enumerate() {
                    // Escapes are few: most runs have none.
                    if symbols.iter().fold(u8::MAX, |least, symbol| least.min(*symbol)) > 0 {
                        continue;
                    }
                    let positions = (run * RUN..).zip(symbols).filter(|(_, symbol)| **symbol == 0);
                    for ((position, _), exponent) in positions.zip(&mut escapes) {
                        elements[position] = element_of(bytes[position], *exponent);
                    }
                }
            }
        }
        Ok(())
    }
}
