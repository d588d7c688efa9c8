//! `encode` and `decode`: blocks of a pool into slots and back, on the way between device and host.

use super::{CtaQuota, Kernel, Kernels, Loader, checks};
use crate::abi::{
    HKV_CODEC_THREADS, HKV_SLOT_CORRUPT, HKV_SLOT_ESCAPES, HKV_SLOT_NOT_FINITE, HKV_SLOT_OK,
    hkv_codec_params, hkv_slot_block, hkv_slot_result,
};
use crate::codec::{self, Codec, Encoded, Fallback, Geometry, Header, SlotLayout};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvView};

const OP: &str = "codec";
/// Most shared memory that a block's tables may take: what every supported architecture has.
const MOST_SHARED: u32 = 96 << 10;

/// Arguments of [`Kernels::encode`] and [`Kernels::decode`].
#[derive(Debug, Clone, Copy)]
pub struct CodecArgs {
    /// How blocks are written into slots.
    pub codec: Codec,
    /// Where blocks are, of bf16 or f16.
    pub kv: KvView,
    /// The first layer slot of a block that goes into its slot.
    pub first_layer_slot: u32,
    /// How many.
    pub num_layers: u32,
    /// [`hkv_slot_block`] rows, in device or pinned host memory.
    pub blocks: Span,
    /// How many.
    pub num_blocks: u64,
    /// [`hkv_slot_result`], one per row, in device or pinned host memory: written.
    pub results: Span,
    /// How much of the GPU the codec may occupy.
    pub quota: CtaQuota,
}

/// One direction: a kernel for each codec, and, where it computes with elements, for bf16 and f16.
struct Direction {
    raw: Kernel,
    lx4: Kernel,
    fp8: [Kernel; 2],
    int8: [Kernel; 2],
    int6: [Kernel; 2],
    int4: [Kernel; 2],
}

impl Direction {
    fn load(loader: &mut Loader<'_>, verb: &str) -> Result<Self> {
        let file = loader.file(verb)?;
        let kernel = |name: &str| file(&format!("hkv_{verb}_{name}"), MOST_SHARED);
        let pair = |name: &str| -> Result<[Kernel; 2]> {
            Ok([kernel(&format!("{name}_bf16"))?, kernel(&format!("{name}_f16"))?])
        };
        Ok(Self {
            raw: kernel("raw")?,
            lx4: kernel("lx4")?,
            fp8: pair("fp8")?,
            int8: pair("int8")?,
            int6: pair("int6")?,
            int4: pair("int4")?,
        })
    }

    fn kernel(&self, codec: Codec, dtype: Dtype) -> Result<&Kernel> {
        let of = usize::from(dtype == Dtype::F16);
        Ok(match codec {
            Codec::Raw => &self.raw,
            Codec::Lx4 => &self.lx4,
            Codec::Fp8(_) => &self.fp8[of],
            Codec::Int8 => &self.int8[of],
            Codec::Int6 => &self.int6[of],
            Codec::Int4 => &self.int4[of],
            Codec::Lxe => return Err(without_kernels(codec)),
        })
    }
}

fn without_kernels(codec: Codec) -> Error {
    let others = Codec::ALL.into_iter().filter(|codec| codec.runs_on_device());
    let others: Vec<&str> = others.map(Codec::name).collect();
    Error::unsupported(OP, "a kernel for", codec, others.join(", "))
}

pub(super) struct Loaded {
    encode: Direction,
    decode: Direction,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        Ok(Self {
            encode: Direction::load(loader, "encode")?,
            decode: Direction::load(loader, "decode")?,
        })
    }
}

impl Kernels {
    /// Encodes blocks into slots, straight to where they are to stay: device or pinned host memory. The
    /// bytes are those of [`Codec::encode`], whatever the quota. No blocks are a no-op.
    ///
    /// A result with a status other than `HKV_SLOT_OK` says that the slot holds nothing, and why: move the
    /// block as it is.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument` for anything the host can see: element type, shape, strides or arrays
    /// that leave their buffers, layers outside of the view, tables that exceed shared memory (encode fewer
    /// layers at a time).
    ///
    /// # Safety
    /// Until the stream has passed the launch: every span in `args` is device or pinned host memory of its length;
    /// rows name blocks of the view and slots of [`Codec::slot_bytes`] bytes at multiples of 16, no two of which
    /// overlap; nothing else accesses what is written, and nothing writes what is read.
    pub unsafe fn encode(&self, args: &CodecArgs, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_codec(args, false, stream) }
    }

    /// Decodes slots into blocks, wherever the slots are, and verifies them on the way. No slots are a no-op.
    ///
    /// A result with the status `HKV_SLOT_CORRUPT` says that the slot is damaged, or of another codec or geometry:
    /// **its block then holds garbage** and must not be attended.
    ///
    /// # Errors
    /// As [`Kernels::encode`].
    ///
    /// # Safety
    /// As [`Kernels::encode`], but that it is no two blocks that are the same; slots may hold anything.
    pub unsafe fn decode(&self, args: &CodecArgs, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_codec(args, true, stream) }
    }

    /// # Safety
    /// That of [`Kernels::encode`] or [`Kernels::decode`].
    unsafe fn run_codec(
        &self,
        args: &CodecArgs,
        decodes: bool,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        if args.num_blocks == 0 {
            return Ok(());
        }
        let geometry = args.check()?;
        let direction = if decodes { &self.codec.decode } else { &self.codec.encode };
        let kernel = direction.kernel(args.codec, geometry.dtype())?;
        let slot = args.codec.slot_layout(&geometry)?;
        if self.checked {
            // SAFETY: the caller's promise about the rows.
            unsafe { checks::codec(args, u64::from(slot.bytes), decodes, stream)? };
        }
        let shared = shared_bytes(&slot, decodes)?;
        let most = self.device.info().multiprocessors;
        let ctas = u64::from(args.quota.resolve(most)).min(args.num_blocks) as u32;
        let mut config = LaunchConfig::linear(ctas, HKV_CODEC_THREADS);
        config.dynamic_shared = shared;
        let params = args.params(&geometry, &slot);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = move |params: &_| unsafe {
            if decodes { decode_on_cpu(params) } else { encode_on_cpu(params) }
        };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu) }
    }
}

/// Whether the kernels have room for the tables of such blocks.
///
/// # Errors
/// `Unsupported` for those that they have not, and for elements that the codec gains nothing on.
pub(crate) fn check_codec_tables(codec: Codec, geometry: &Geometry) -> Result<()> {
    if !codec.runs_on_device() {
        return Err(without_kernels(codec));
    }
    let slot = codec.slot_layout(geometry)?;
    [false, true].into_iter().try_for_each(|decodes| shared_bytes(&slot, decodes).map(drop))
}

/// Dynamic shared memory of a CTA: header and tables, a counter, and, where `lx4` encodes, its escapes.
fn shared_bytes(slot: &SlotLayout, decodes: bool) -> Result<u32> {
    let escapes = if decodes { 0 } else { 5 * slot.escapes };
    let needed = slot.elements + 16 + escapes;
    if needed > MOST_SHARED {
        return Err(Error::unsupported(
            OP,
            "a block",
            format!("whose tables take {needed} bytes"),
            format!("up to {MOST_SHARED}: give fewer layers at a time"),
        ));
    }
    Ok(needed)
}

impl CodecArgs {
    /// Checks everything the host can see; the geometry of a slot.
    fn check(&self) -> Result<Geometry> {
        self.kv.check(OP)?;
        let shape = &self.kv.shape;
        let geometry = Geometry::new(
            self.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            self.kv.block_size,
            shape.dtype,
        )?;
        let end = u64::from(self.first_layer_slot) + u64::from(self.num_layers);
        if end > u64::from(self.kv.num_layer_slots) {
            return Err(Error::invalid(
                OP,
                format!(
                    "layer slots {}..{end}, the view has {}",
                    self.first_layer_slot, self.kv.num_layer_slots
                ),
            ));
        }
        for (what, span, row) in [
            ("the rows", &self.blocks, size_of::<hkv_slot_block>()),
            ("the results", &self.results, size_of::<hkv_slot_result>()),
        ] {
            let bytes = self
                .num_blocks
                .checked_mul(row as u64)
                .filter(|&bytes| bytes <= i64::MAX as u64)
                .ok_or_else(|| Error::invalid(OP, format!("{what} overflow 64-bit addresses")))?;
            span.check(OP, what, bytes, 8)?;
        }
        Ok(geometry)
    }

    fn params(&self, geometry: &Geometry, slot: &SlotLayout) -> hkv_codec_params {
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&slot.header[8 * i..8 * i + 8]);
            u64::from_le_bytes(bytes)
        };
        let strides = &self.kv.strides;
        hkv_codec_params {
            k: self.kv.k.address as *mut _,
            v: self.kv.v.address as *mut _,
            blocks: self.blocks.address as *const _,
            results: self.results.address as *mut _,
            num_blocks: self.num_blocks as i64,
            kv_stride_block: strides.block,
            kv_stride_layer: strides.layer,
            kv_stride_head: strides.head,
            kv_stride_token: strides.token,
            header: [word(0), word(1)],
            sections: slot.offsets,
            elements: slot.elements,
            slot_bytes: slot.bytes,
            escapes: slot.escapes as i32,
            scale_planes: slot.scale_planes as i32,
            codec: self.codec.code().into(),
            first_layer_slot: self.first_layer_slot as i32,
            num_layers: geometry.layers() as i32,
            num_kv_heads: geometry.num_kv_heads() as i32,
            head_dim: geometry.head_dim() as i32,
            block_size: geometry.block_size() as i32,
            dtype: geometry.dtype().code() as i32,
        }
    }
}

/// The kernels' work as the parameters say it.
struct Work {
    codec: Codec,
    geometry: Geometry,
}

impl Work {
    /// `None` for parameters that no launcher makes.
    fn of(p: &hkv_codec_params) -> Option<Self> {
        let dtype = [Dtype::Bf16, Dtype::F16].into_iter().find(|d| d.code() as i32 == p.dtype)?;
        let sizes = [p.num_layers, p.num_kv_heads, p.head_dim, p.block_size];
        let [layers, heads, dim, block_size] = sizes.map(|n| n as u32);
        let codec = Codec::of_code(u8::try_from(p.codec).ok()?)?;
        let geometry = Geometry::new(layers, heads, dim, block_size, dtype).ok()?;
        Some(Self { codec, geometry })
    }

    /// Addresses of a block's rows of `head_dim` elements, `[layer][K|V][head][token]`.
    fn rows(&self, p: &hkv_codec_params, block: i64) -> impl Iterator<Item = *mut u16> {
        let (heads, tokens) = (i64::from(p.num_kv_heads), i64::from(p.block_size));
        let first = i64::from(p.first_layer_slot);
        let (strides, bases) = (
            [p.kv_stride_block, p.kv_stride_layer, p.kv_stride_head, p.kv_stride_token],
            [p.k.cast::<u16>(), p.v.cast::<u16>()],
        );
        (0..self.geometry.planes() as i64 * tokens).map(move |row| {
            let (plane, token) = (row / tokens, row % tokens);
            let (layer, head) = (first + plane / (2 * heads), plane % heads);
            let base = bases[usize::from(plane / heads % 2 == 1)];
            let at = [block, layer, head, token];
            base.wrapping_offset(at.iter().zip(strides).map(|(i, s)| i * s).sum::<i64>() as isize)
        })
    }
}

impl From<Encoded> for hkv_slot_result {
    fn from(encoded: Encoded) -> Self {
        let (hash, escapes, status) = match encoded {
            Encoded::Fits { hash, escapes, .. } => (hash, escapes, HKV_SLOT_OK),
            Encoded::RawFallback(Fallback::Escapes { needed, .. }) => {
                (0, needed as u32, HKV_SLOT_ESCAPES)
            }
            // Exponents for which the slot has no room, here too.
            Encoded::RawFallback(Fallback::Streams { .. }) => (0, 0, HKV_SLOT_ESCAPES),
            Encoded::RawFallback(Fallback::NotFinite) => (0, 0, HKV_SLOT_NOT_FINITE),
        };
        Self { hash, escapes, status: status as i32 }
    }
}

/// The encode kernels on the CPU device.
///
/// # Safety
/// Every address in `p` and its rows is valid for what abi/params.h says that the kernel reads or writes there.
unsafe fn encode_on_cpu(p: &hkv_codec_params) {
    let Some(work) = Work::of(p) else { return };
    let mut elements = vec![0; work.geometry.elements()];
    for i in 0..p.num_blocks as isize {
        // SAFETY: the caller vouches for the rows, the blocks and slots they name, and the results.
        unsafe {
            let hkv_slot_block { block, slot } = *p.blocks.offset(i);
            let rows = elements.chunks_exact_mut(work.geometry.head_dim());
            for (to, from) in rows.zip(work.rows(p, block)) {
                to.copy_from_slice(std::slice::from_raw_parts(from, to.len()));
            }
            let slot = std::slice::from_raw_parts_mut(slot.cast::<u8>(), p.slot_bytes as usize);
            // An error would be one of the arguments, which the launcher has checked.
            let encoded = work.codec.encode(&work.geometry, &elements, slot);
            let encoded = encoded.unwrap_or(Encoded::RawFallback(Fallback::NotFinite));
            *p.results.offset(i) = encoded.into();
        }
    }
}

/// The decode kernels on the CPU device.
///
/// # Safety
/// As [`encode_on_cpu`].
unsafe fn decode_on_cpu(p: &hkv_codec_params) {
    let Some(work) = Work::of(p) else { return };
    let mut elements = vec![0; work.geometry.elements()];
    for i in 0..p.num_blocks as isize {
        // SAFETY: the caller vouches for the rows, the blocks and slots they name, and the results.
        unsafe {
            let hkv_slot_block { block, slot } = *p.blocks.offset(i);
            let slot = std::slice::from_raw_parts(slot.cast::<u8>(), p.slot_bytes as usize);
            let header = Header::read(slot).and_then(|header| {
                if header.codec == work.codec {
                    codec::decode(&work.geometry, slot, &mut elements)
                } else {
                    Err(Error::invalid(OP, "another codec"))
                }
            });
            let (hash, escapes, status) = match header {
                Ok(header) => {
                    let rows = elements.chunks_exact(work.geometry.head_dim());
                    for (from, to) in rows.zip(work.rows(p, block)) {
                        std::slice::from_raw_parts_mut(to, from.len()).copy_from_slice(from);
                    }
                    (header.hash, header.escapes, HKV_SLOT_OK)
                }
                Err(_) => (0, 0, HKV_SLOT_CORRUPT),
            };
            *p.results.offset(i) = hkv_slot_result { hash, escapes, status: status as i32 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::layout::KvShape;
    use crate::ops::check_slot_blocks;

    const SHAPE: KvShape = KvShape { num_kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
    const BLOCK_BYTES: u64 = 3 * 16 * SHAPE.token_bytes() as u64;

    fn args(codec: Codec, pool: Span) -> CodecArgs {
        CodecArgs {
            codec,
            kv: KvView::block_first(pool, SHAPE, 16, 3, 4, BLOCK_BYTES).unwrap(),
            first_layer_slot: 0,
            num_layers: 3,
            blocks: Span::new(4096, 32),
            num_blocks: 2,
            results: Span::new(4096, 32),
            quota: CtaQuota::HOST_LINK,
        }
    }

    #[test]
    fn what_no_launch_can_serve_is_refused() {
        let device = Device::cpu();
        let kernels = Kernels::load(&device).unwrap();
        let stream = device.stream().unwrap();
        let good = args(Codec::Int6, Span::new(4096, 4 * BLOCK_BYTES));
        let huge = KvShape { num_kv_heads: 128, head_dim: 256, dtype: Dtype::Bf16 };
        let huge_bytes = 128 * huge.token_bytes() as u64;
        for (args, words) in [
            (CodecArgs { codec: Codec::Lxe, ..good }, "a kernel for lxe is not supported"),
            (CodecArgs { first_layer_slot: 1, ..good }, "layer slots 1..4"),
            (CodecArgs { num_layers: 0, ..good }, "at least one layer"),
            (CodecArgs { blocks: Span::new(4096, 31), ..good }, "the rows"),
            (CodecArgs { results: Span::new(4100, 32), ..good }, "the results"),
            (CodecArgs { num_blocks: u64::MAX, ..good }, "overflow"),
            (
                CodecArgs {
                    kv: KvView { shape: KvShape { head_dim: 40, ..SHAPE }, ..good.kv },
                    ..good
                },
                "head_dim",
            ),
            (
                CodecArgs {
                    codec: Codec::Lx4,
                    kv: KvView { shape: KvShape { dtype: Dtype::F16, ..SHAPE }, ..good.kv },
                    ..good
                },
                "lx4 of f16",
            ),
            (
                CodecArgs {
                    kv: KvView::block_first(
                        Span::new(4096, huge_bytes),
                        huge,
                        128,
                        1,
                        1,
                        huge_bytes,
                    )
                    .unwrap(),
                    num_layers: 1,
                    ..good
                },
                "fewer layers",
            ),
        ] {
            // SAFETY: nothing is launched.
            let error = unsafe { kernels.encode(&args, stream.as_ref()) }.unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn rows_that_would_write_elsewhere_are_found() {
        let row = |block: i64, slot: u64| hkv_slot_block { block, slot: slot as *mut _ };
        let check = |rows: &[hkv_slot_block], decodes| {
            check_slot_blocks(rows, 4, 4096, decodes).map_err(|error| error.to_string())
        };
        let good = [row(3, 4096), row(0, 8192)];
        check(&good, false).unwrap();
        check(&good, true).unwrap();
        for (rows, decodes, words) in [
            ([row(4, 4096), row(0, 8192)], false, "names block 4"),
            ([row(-1, 4096), row(0, 8192)], false, "names block -1"),
            ([row(1, 0), row(0, 8192)], false, "null"),
            ([row(1, 4104), row(0, 12288)], true, "no multiple of 16"),
            ([row(1, 4096), row(0, 8176)], false, "rows 0 and 1"),
            ([row(2, 4096), row(2, 8192)], true, "rows 0 and 1"),
        ] {
            let error = check(&rows, decodes).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        // One block into two slots, two blocks out of one: both write to different memory.
        check(&[row(2, 4096), row(2, 8192)], false).unwrap();
        check(&[row(1, 4096), row(2, 4096)], true).unwrap();
    }
}
