//! Codecs in the C ABI: blocks of a pool into slots and back on a device, and slots by themselves on the host.

use std::ffi::{c_char, c_void};

use super::header::*;
use super::raw::{Arguments, arguments, array, array_mut, handle, out, text};
use super::{dtype, guard, hkv_kernels, quota};
use crate::abi::hkv_slot_result;
use crate::codec::{self, Codec, Geometry, Header};
use crate::error::{Error, Result};
use crate::ops::CodecArgs;

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_encode(
    kernels: *const hkv_kernels,
    args: *const hkv_codec_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_encode";
    // SAFETY: the caller's promise: handles are live, memory is valid until the stream has passed.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        kernels.encode(&args, kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_decode(
    kernels: *const hkv_kernels,
    args: *const hkv_codec_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_decode";
    // SAFETY: as for `hkv_encode`.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        kernels.decode(&args, kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_codec_by_name(name: *const c_char, codec: *mut u32) -> hkv_status {
    const OP: &str = "hkv_codec_by_name";
    // SAFETY: the caller's promise: a string that ends, a place to write to.
    guard(|| unsafe {
        let codec = out(OP, "codec", codec)?;
        *codec = Codec::by_name(text(OP, "name", name)?)?.code().into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn hkv_codec_name(codec: u32) -> *const c_char {
    let name = match codec {
        HKV_CODEC_RAW => c"raw",
        HKV_CODEC_LX4 => c"lx4",
        HKV_CODEC_LXE => c"lxe",
        HKV_CODEC_FP8_TENSOR => c"fp8-tensor",
        HKV_CODEC_FP8_HEAD => c"fp8-head",
        HKV_CODEC_FP8 => c"fp8",
        HKV_CODEC_INT8 => c"int8",
        HKV_CODEC_INT6 => c"int6",
        HKV_CODEC_INT4 => c"int4",
        _ => c"unknown codec",
    };
    name.as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_slot_bytes(
    codec: u32,
    geometry: *const hkv_geometry,
    bytes: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_slot_bytes";
    // SAFETY: the caller's promise: a geometry to read, a place to write to.
    guard(|| unsafe {
        let bytes = out(OP, "bytes", bytes)?;
        *bytes =
            codec_of(OP, codec)?.slot_bytes(&handle(OP, "geometry", geometry)?.to_codec()?)? as u64;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_slot_encode(
    codec: u32,
    geometry: *const hkv_geometry,
    block: *const u16,
    num_elements: u64,
    slot: *mut c_void,
    slot_bytes: u64,
    result: *mut hkv_slot_result,
) -> hkv_status {
    const OP: &str = "hkv_slot_encode";
    // SAFETY: the caller's promise: a geometry, arrays of their lengths that lie apart, a place to write to.
    guard(|| unsafe {
        let codec = codec_of(OP, codec)?;
        let geometry = handle(OP, "geometry", geometry)?.to_codec()?;
        let block = array(OP, "elements", block, num_elements)?;
        let slot = array_mut(OP, "bytes of the slot", slot.cast::<u8>(), slot_bytes)?;
        let result = out(OP, "result", result)?;
        *result = codec.encode(&geometry, block, slot)?.into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_slot_decode(
    geometry: *const hkv_geometry,
    slot: *const c_void,
    slot_bytes: u64,
    block: *mut u16,
    num_elements: u64,
    header: *mut hkv_slot_header,
) -> hkv_status {
    const OP: &str = "hkv_slot_decode";
    // SAFETY: as for `hkv_slot_encode`.
    guard(|| unsafe {
        let geometry = handle(OP, "geometry", geometry)?.to_codec()?;
        let slot = array(OP, "bytes of the slot", slot.cast::<u8>(), slot_bytes)?;
        let block = array_mut(OP, "elements", block, num_elements)?;
        let read = codec::decode(&geometry, slot, block)?;
        if let Some(header) = header.as_mut() {
            *header = read.into();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_slot_inspect(
    slot: *const c_void,
    slot_bytes: u64,
    header: *mut hkv_slot_header,
) -> hkv_status {
    const OP: &str = "hkv_slot_inspect";
    // SAFETY: as for `hkv_slot_encode`.
    guard(|| unsafe {
        let slot = array(OP, "bytes of the slot", slot.cast::<u8>(), slot_bytes)?;
        *out(OP, "header", header)? = Header::read(slot)?.into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_slot_verify(
    geometry: *const hkv_geometry,
    slot: *const c_void,
    slot_bytes: u64,
    header: *mut hkv_slot_header,
) -> hkv_status {
    const OP: &str = "hkv_slot_verify";
    // SAFETY: as for `hkv_slot_encode`.
    guard(|| unsafe {
        let geometry = handle(OP, "geometry", geometry)?.to_codec()?;
        let slot = array(OP, "bytes of the slot", slot.cast::<u8>(), slot_bytes)?;
        let read = codec::verify(&geometry, slot)?;
        if let Some(header) = header.as_mut() {
            *header = read.into();
        }
        Ok(())
    })
}

// SAFETY: `struct_bytes` is the first field.
unsafe impl Arguments for hkv_codec_args {}

impl hkv_codec_args {
    fn to_ops(self) -> Result<CodecArgs> {
        Ok(CodecArgs {
            codec: codec_of("codec", self.codec)?,
            kv: self.kv.to_ops()?,
            first_layer_slot: self.first_layer_slot,
            num_layers: self.num_layers,
            blocks: self.blocks.to_ops(),
            num_blocks: self.num_blocks,
            results: self.results.to_ops(),
            quota: quota(self.max_ctas),
        })
    }
}

fn codec_of(op: &'static str, code: u32) -> Result<Codec> {
    let codec = u8::try_from(code).ok().and_then(Codec::of_code);
    codec.ok_or_else(|| Error::unsupported(op, "codec", code, "the values of enum hkv_codec"))
}

impl hkv_geometry {
    fn to_codec(self) -> Result<Geometry> {
        Geometry::new(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.block_size,
            dtype(self.dtype, "geometry.dtype")?,
        )
    }
}

impl From<Header> for hkv_slot_header {
    fn from(header: Header) -> Self {
        let geometry = &header.geometry;
        Self {
            geometry: hkv_geometry {
                num_layers: geometry.layers() as u32,
                num_kv_heads: geometry.num_kv_heads() as u32,
                head_dim: geometry.head_dim() as u32,
                block_size: geometry.block_size() as u32,
                dtype: geometry.dtype().code(),
            },
            codec: header.codec.code().into(),
            version: Header::VERSION.into(),
            bytes: header.bytes,
            escapes: header.escapes,
            reserved: 0,
            hash: header.hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn codecs_have_the_numbers_and_names_of_the_library() {
        for codec in Codec::ALL {
            // SAFETY: a static string.
            let name = unsafe { CStr::from_ptr(hkv_codec_name(codec.code().into())) };
            assert_eq!(name.to_str(), Ok(codec.name()));
        }
    }
}
