//! How host slots hold blocks: the one place that says which codec a layer group has in the host tier.
//!
//! A slot holds a block as it is, or in *sections*: slots of a codec (src/codec), each with a run of the group's
//! layers, one behind another. A section is encoded, decoded and verified alone. There are as few of them as the
//! kernels' shared memory allows, or as many as were asked for, so that layers can come up one after another.
//!
//! All slots of a tier have one size: that of the group that needs most. Groups of a plan have blocks of one size,
//! so that one codec for all of them wastes little, and codecs that differ much waste what they save.

use crate::codec::{self, Codec, Geometry};
use crate::device::Span;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{KvShape, KvView};
use crate::ops::check_codec_tables;
use crate::spec::{GroupPlan, LayerGroup};

use super::OP;

/// Slots that hold blocks as they are begin at multiples of this many bytes, so that registration never splits a
/// page of one.
const PAGE: u64 = 4096;
/// Sections begin at multiples of this many bytes, so that they cross the link in whole lines.
const LINE: u64 = 128;

/// Which codec the host tier keeps the blocks of each layer group in. Recurrent states are kept as they are.
///
/// The default is lossless: `lx4` where it holds the group's elements, else raw. Lossy ones are the caller's choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostCodecs {
    /// Of the groups without a choice of their own; `None`: the default.
    all: Option<Codec>,
    groups: Vec<(usize, Codec)>,
    sections: u32,
}

impl HostCodecs {
    /// One codec for all attention groups.
    pub fn all(codec: Codec) -> Self {
        Self { all: Some(codec), ..Self::default() }
    }

    /// The same with another codec for one group.
    pub fn with_group(mut self, group: usize, codec: Codec) -> Self {
        self.groups.push((group, codec));
        self
    }

    /// The same with slots of at least so many sections, as far as there are layers: what comes layer by layer comes
    /// section by section. Each costs a header, and `lx4` has fewer escapes to share in it.
    pub fn in_sections(self, sections: u32) -> Self {
        Self { sections, ..self }
    }

    /// The caller's choice for a group, the later one.
    fn of(&self, group: usize) -> Option<Codec> {
        let own = self.groups.iter().rev().find(|(of, _)| *of == group);
        own.map(|(_, codec)| *codec).or(self.all)
    }
}

/// A run of a group's layers in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// The first of them.
    pub first_layer_slot: u32,
    /// Their shape.
    pub geometry: Geometry,
    /// Where they begin in the slot.
    pub offset: u64,
    /// Bytes that they take there.
    pub bytes: u64,
}

/// How slots hold the blocks of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupFormat {
    /// The codec; [`Codec::Raw`]: the block as it is, without a header.
    pub codec: Codec,
    /// Back to back, in the order of the layers. Of a block that is kept as it is: the one run of all its layers, or
    /// none where no codec knows their elements.
    pub sections: Vec<Section>,
}

impl GroupFormat {
    fn of(group: &LayerGroup, chosen: Option<Codec>, sections: u32) -> Result<Self> {
        let encoded = |codec: Codec| match codec {
            Codec::Raw => Ok(Self::raw(group)),
            _ => Self::encoded(group, codec, sections),
        };
        match chosen {
            Some(codec) => encoded(codec),
            None => Ok(encoded(Codec::Lx4).unwrap_or_else(|_| Self::raw(group))),
        }
    }

    fn raw(group: &LayerGroup) -> Self {
        let layers = group.layers.len() as u32;
        let all = geometry(group, layers).ok().map(|geometry| Section {
            first_layer_slot: 0,
            geometry,
            offset: 0,
            bytes: geometry.raw_bytes() as u64,
        });
        Self { codec: Codec::Raw, sections: all.into_iter().collect() }
    }

    /// As few sections as kernels take, `at_least` so many.
    fn encoded(group: &LayerGroup, codec: Codec, at_least: u32) -> Result<Self> {
        let layers = group.layers.len() as u32;
        let fits = |count| check_codec_tables(codec, &geometry(group, layers.div_ceil(count))?);
        let mut count = at_least.clamp(1, layers.max(1));
        while count < layers && fits(count).is_err() {
            count += 1;
        }
        fits(count)?;
        let (mut sections, mut offset) = (Vec::new(), 0);
        for s in 0..count {
            let (first, end) = (s * layers / count, (s + 1) * layers / count);
            let geometry = geometry(group, end - first)?;
            let bytes = codec.slot_bytes(&geometry)? as u64;
            sections.push(Section { first_layer_slot: first, geometry, offset, bytes });
            offset += bytes.next_multiple_of(LINE);
        }
        Ok(Self { codec, sections })
    }

    /// The block that a slot holds.
    pub(super) fn read(&self, slot: &[u8]) -> Result<Vec<u16>> {
        let Some(first) = self.sections.first() else {
            return Err(Error::invalid(OP, "no codec knows the elements of this group"));
        };
        if !self.is_encoded() {
            let block = slot[..first.bytes as usize].chunks_exact(2);
            return Ok(block.map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect());
        }
        let mut block = Vec::new();
        for Section { geometry, offset, bytes, .. } in &self.sections {
            let begin = block.len();
            block.resize(begin + geometry.elements(), 0);
            let section = &slot[*offset as usize..(offset + bytes) as usize];
            let header = codec::decode(geometry, section, &mut block[begin..])?;
            if header.codec != self.codec {
                let what = format!("a slot in {}, not in {}", header.codec, self.codec);
                return Err(Error::new(OP, ErrorKind::Corrupt(what)));
            }
        }
        Ok(block)
    }

    /// Whether blocks are kept in another form than their own.
    pub fn is_encoded(&self) -> bool {
        self.codec != Codec::Raw
    }

    /// Bytes up to the end of the last section.
    pub(super) fn end(&self) -> u64 {
        self.sections.last().map_or(0, |section| section.offset + section.bytes)
    }

    /// The blocks of a pool as the codec's kernels see them; `None` for groups that no codec knows.
    pub(super) fn view(
        &self,
        pool: Span,
        block_bytes: u64,
        num_blocks: u64,
    ) -> Result<Option<KvView>> {
        let Some(last) = self.sections.last() else { return Ok(None) };
        let of = last.geometry;
        let shape = KvShape {
            num_kv_heads: of.num_kv_heads() as u32,
            head_dim: of.head_dim() as u32,
            dtype: of.dtype(),
        };
        let layers = last.first_layer_slot + of.layers() as u32;
        let block_size = of.block_size() as u32;
        KvView::block_first(pool, shape, block_size, layers, num_blocks, block_bytes).map(Some)
    }
}

fn geometry(group: &LayerGroup, layers: u32) -> Result<Geometry> {
    let KvShape { num_kv_heads, head_dim, dtype } = group.shape;
    Geometry::new(layers, num_kv_heads, head_dim, group.block_size, dtype)
}

/// How the slots of a tier hold blocks, by layer group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotFormat {
    groups: Vec<GroupFormat>,
}

impl SlotFormat {
    /// All blocks as they are, whatever is in them.
    pub const AS_IS: Self = Self { groups: Vec::new() };

    /// The format of a plan's groups under a choice of codecs.
    ///
    /// # Errors
    /// `Unsupported` for a codec that does not know a group's elements or shape, or of which a single layer has
    /// larger tables than the kernels have room for; `InvalidArgument` for the choice for a group that does not exist or is one of states.
    pub fn of(plan: &GroupPlan, codecs: &HostCodecs) -> Result<Self> {
        if let Some((group, codec)) = codecs.groups.iter().find(|(g, _)| *g >= plan.groups.len()) {
            let all = plan.groups.len();
            return Err(Error::invalid(
                OP,
                format!(
                    "{codec} for group {group}: the attention groups are 0 to {}",
                    all.saturating_sub(1)
                ),
            ));
        }
        let attention = plan.groups.iter().enumerate();
        let attention =
            attention.map(|(g, group)| GroupFormat::of(group, codecs.of(g), codecs.sections));
        let state = |_| Ok(GroupFormat { codec: Codec::Raw, sections: Vec::new() });
        let groups = attention.chain(plan.states.iter().map(state)).collect::<Result<Vec<_>>>()?;
        Ok(Self { groups })
    }

    /// The groups as the manager numbers them: attention, then states. None for [`Self::AS_IS`].
    pub fn groups(&self) -> &[GroupFormat] {
        &self.groups
    }

    /// The codec of each group, for the manager's [`HostConfig`](crate::manager::HostConfig).
    pub fn codecs(&self) -> Vec<Codec> {
        self.groups.iter().map(|group| group.codec).collect()
    }

    /// The codec of a group.
    pub fn codec(&self, group: u32) -> Codec {
        self.groups.get(group as usize).map_or(Codec::Raw, |group| group.codec)
    }

    /// The format of a group whose blocks are kept in another form than their own.
    pub(super) fn encoded(&self, group: u32) -> Option<&GroupFormat> {
        self.groups.get(group as usize).filter(|group| group.is_encoded())
    }

    /// Bytes that a block of a group moves to a slot or from it.
    pub(super) fn moved_bytes(&self, group: u32, block_bytes: u64) -> u64 {
        self.encoded(group).map_or(block_bytes, GroupFormat::end)
    }

    /// Bytes of a slot that any block of `block_bytes` may use: what a tier below stores of it.
    pub fn slot_bytes(&self, block_bytes: usize) -> usize {
        let all = 0..self.groups.len() as u32;
        let most = all.map(|group| self.moved_bytes(group, block_bytes as u64)).max();
        most.map_or(block_bytes, |bytes| bytes as usize)
    }

    /// From one slot to the next.
    pub(super) fn stride(&self, block_bytes: usize) -> u64 {
        let encoded = !self.groups.is_empty() && self.groups.iter().all(GroupFormat::is_encoded);
        let align = if encoded { LINE } else { PAGE };
        (self.slot_bytes(block_bytes) as u64).next_multiple_of(align)
    }

    /// The identity of what slots hold, for a store below: that of the manager's blocks where they are kept as they
    /// are, another one for every other format, so that no slot is ever read as what it is not.
    pub fn identity(&self, blocks: &[u8; 32]) -> [u8; 32] {
        if !self.groups.iter().any(GroupFormat::is_encoded) {
            return *blocks;
        }
        let mut hasher = blake3::Hasher::new_keyed(blocks);
        for group in &self.groups {
            hasher.update(&[group.codec.code()]);
            hasher.update(&(group.sections.len() as u64).to_le_bytes());
            for section in &group.sections {
                let numbers = [u64::from(section.first_layer_slot), section.offset, section.bytes];
                numbers.iter().for_each(|n| _ = hasher.update(&n.to_le_bytes()));
            }
        }
        *hasher.finalize().as_bytes()
    }
}
