//! What every codec promises: exactness or its error bound, whatever the bits; slots of one size; a refusal of
//! every damaged slot, with nothing written.

use proptest::prelude::*;

use super::*;
use crate::layout::Dtype;

fn geometry(layers: u32, heads: u32, dim: u32, block_size: u32, dtype: Dtype) -> Geometry {
    Geometry::new(layers, heads, dim, block_size, dtype).unwrap()
}

fn small(dtype: Dtype) -> Geometry {
    geometry(1, 2, 16, 8, dtype)
}

fn codecs_of(dtype: Dtype) -> impl Iterator<Item = Codec> {
    let exponents = |codec| matches!(codec, Codec::Lx4 | Codec::Lxe);
    Codec::ALL.into_iter().filter(move |codec| !exponents(*codec) || dtype == Dtype::Bf16)
}

/// Normal deviates enough for tests: the sum of uniform ones, in channels of different magnitude and offset.
fn keys_and_values(geometry: &Geometry, seed: u64, outliers: bool) -> Vec<u16> {
    let mut state = seed;
    let mut uniform = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let dim = geometry.head_dim();
    (0..geometry.elements())
        .map(|i| {
            let x = (0..6).map(|_| uniform()).sum::<f32>();
            let is_outlier =
                outliers && geometry.is_key(i / geometry.plane_elements()) && i % dim % 7 == 3;
            round::nearest(geometry.dtype(), if is_outlier { 40.0 * x + 90.0 } else { x })
        })
        .collect()
}

fn encode(codec: Codec, geometry: &Geometry, block: &[u16]) -> (Vec<u8>, Encoded) {
    // What a slot held before must not show.
    let mut slot = vec![0xa5; codec.slot_bytes(geometry).unwrap()];
    let encoded = codec.encode(geometry, block, &mut slot).unwrap();
    if let Encoded::Fits { bytes, .. } = encoded {
        assert!(slot[bytes as usize..].iter().all(|byte| *byte == 0xa5), "{codec}: written behind");
        slot.truncate(bytes as usize);
    }
    (slot, encoded)
}

fn decoded(geometry: &Geometry, slot: &[u8]) -> Vec<u16> {
    let mut block = vec![0xdead; geometry.elements()];
    decode(geometry, slot, &mut block).unwrap();
    block
}

/// Refused as corrupt, and nothing written.
fn refused(geometry: &Geometry, slot: &[u8]) -> String {
    let mut block = vec![0xdead; geometry.elements()];
    let error = decode(geometry, slot, &mut block).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Corrupt(_)), "{error}");
    assert!(block.iter().all(|x| *x == 0xdead), "{error}: something was written");
    error.to_string()
}

fn any_geometry() -> impl Strategy<Value = Geometry> {
    let dims = prop::sample::select(vec![16, 48, 64, 96, 128, 256]);
    (1u32..3, 1u32..4, dims, 3u32..8, any::<bool>()).prop_map(|(layers, heads, dim, shift, f16)| {
        geometry(layers, heads, dim, 1 << shift, if f16 { Dtype::F16 } else { Dtype::Bf16 })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn lossless_codecs_give_back_every_bit_pattern(
        dim in prop::sample::select(vec![16u32, 96, 128]),
        seed: u64,
        bits in prop::collection::vec(any::<u16>(), 1..12),
        at in prop::collection::vec(any::<prop::sample::Index>(), 12),
    ) {
        let geometry = geometry(2, 2, dim, 16, Dtype::Bf16);
        let mut block = keys_and_values(&geometry, seed, true);
        for (bits, at) in bits.iter().zip(at) {
            let len = block.len();
            block[at.index(len)] = *bits;
        }
        let (slot, _) = encode(Codec::Raw, &geometry, &block);
        prop_assert_eq!(&decoded(&geometry, &slot), &block);
        for codec in [Codec::Lx4, Codec::Lxe] {
            let (slot, encoded) = encode(codec, &geometry, &block);
            if matches!(encoded, Encoded::Fits { .. }) {
                prop_assert_eq!(&decoded(&geometry, &slot), &block);
            }
            // A dozen odd elements fit the list, unless one of them moves a window.
            let ordinary = bits.iter().all(|b| b >> 7 & 0xff <= 0x80);
            prop_assert!(!ordinary || matches!(encoded, Encoded::Fits { .. }), "{:?}", encoded);
        }
    }

    #[test]
    fn bytes_depend_on_the_block_alone(geometry in any_geometry(), seed: u64) {
        let block = keys_and_values(&geometry, seed, false);
        for codec in codecs_of(geometry.dtype()) {
            let (slot, encoded) = encode(codec, &geometry, &block);
            let mut other = vec![0x3c; codec.slot_bytes(&geometry).unwrap() + 100];
            prop_assert_eq!(codec.encode(&geometry, &block, &mut other).unwrap(), encoded);
            prop_assert_eq!(&slot[..], &other[..slot.len()]);
            prop_assert!(other[slot.len()..].iter().all(|x| *x == 0x3c));
            prop_assert!(slot.len().is_multiple_of(16));
        }
    }

    /// Of `int8` and `int6`, and of K in `int4`: half a step, of the range of the element's own group.
    #[test]
    fn integers_are_off_by_half_a_step(geometry in any_geometry(), seed: u64, outliers: bool) {
        let block = keys_and_values(&geometry, seed, outliers);
        let dtype = geometry.dtype();
        let values: Vec<f32> = block.iter().map(|x| round::to_f32(dtype, *x)).collect();
        let (dim, plane) = (geometry.head_dim(), geometry.plane_elements());
        for (codec, levels) in [(Codec::Int8, 255.0), (Codec::Int6, 63.0), (Codec::Int4, 15.0)] {
            let (slot, _) = encode(codec, &geometry, &block);
            for (i, bits) in decoded(&geometry, &slot).into_iter().enumerate() {
                let is_key = geometry.is_key(i / plane);
                if codec == Codec::Int4 && !is_key {
                    continue;
                }
                let (first, inside) = (i / plane * plane, i % plane);
                let group: Vec<f32> = if is_key {
                    let tokens = inside / dim / 64 * 64..(inside / dim / 64 * 64 + 64).min(geometry.block_size());
                    tokens.map(|token| values[first + token * dim + inside % dim]).collect()
                } else {
                    values[i / dim * dim..][..dim].to_vec()
                };
                let least = group.iter().copied().fold(f32::INFINITY, f32::min);
                let largest = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // The step is rounded up, the result to the elements' type.
                let relative = if dtype == Dtype::F16 { 1.0 / 1024.0 } else { 1.0 / 128.0 };
                let step = (largest - least) / levels * (1.0 + relative);
                let restored = round::to_f32(dtype, bits);
                let size = values[i].abs().max(restored.abs()).max(step);
                let bound = 0.5001 * step + relative / 2.0 * size + 1e-7;
                let error = (restored - values[i]).abs();
                prop_assert!(error <= bound, "{codec} {geometry} {i}: {error} > {bound}");
            }
        }
    }

    #[test]
    fn fp8_keeps_its_bound(geometry in any_geometry(), seed: u64) {
        let block = keys_and_values(&geometry, seed, false);
        let dtype = geometry.dtype();
        for per in [ScalePer::Tensor, ScalePer::Head, ScalePer::Token] {
            let (slot, _) = encode(Codec::Fp8(per), &geometry, &block);
            for (bits, element) in decoded(&geometry, &slot).into_iter().zip(&block) {
                let (x, y) = (round::to_f32(dtype, *element), round::to_f32(dtype, bits));
                // The largest element here is 3, so no scale is above 3 / 448.
                prop_assert!((x - y).abs() <= (x.abs() / 15.0).max(3.0 / 448.0 / 1000.0));
            }
        }
    }

    #[test]
    fn bytes_that_are_no_slot_are_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header: bool,
    ) {
        let geometry = small(Dtype::Bf16);
        let mut slot = bytes;
        if header {
            slot.splice(0..0, *b"HKVC\x01\x01");
        }
        refused(&geometry, &slot);
    }

    /// Payloads with a valid header and hash that no encoder writes: never a panic, and nothing written when
    /// they are refused.
    #[test]
    fn forged_payloads_do_no_harm(
        code in 0usize..Codec::ALL.len(),
        seed: u64,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
    ) {
        let geometry = small(Dtype::Bf16);
        let codec = Codec::ALL[code];
        let (mut slot, _) = encode(codec, &geometry, &keys_and_values(&geometry, seed, false));
        for (at, byte) in damage {
            let at = Header::BYTES + at.index(slot.len() - Header::BYTES);
            slot[at] = byte;
        }
        let hash = content_hash(&slot);
        slot[24..32].copy_from_slice(&hash.to_le_bytes());
        let mut block = vec![0xdead; geometry.elements()];
        if decode(&geometry, &slot, &mut block).is_err() {
            prop_assert!(block.iter().all(|x| *x == 0xdead));
        }
    }
}

#[test]
fn all_16_bit_patterns_survive_lx4_and_lxe() {
    // A channel each of one exponent and its neighbours: 128 patterns of sign and mantissa, all exponents.
    let geometry = geometry(1, 128, 16, 128, Dtype::Bf16);
    let plane = geometry.plane_elements();
    let block: Vec<u16> = (0..geometry.elements())
        .map(|i| {
            let (exponent, rest) = ((i / plane) as u16, (i % plane) as u16);
            (rest & 0x80) << 8 | exponent << 7 | rest & 0x7f
        })
        .collect();
    let mut seen = vec![false; 1 << 16];
    block.iter().for_each(|x| seen[usize::from(*x)] = true);
    assert!(seen.iter().all(|seen| *seen));
    for codec in [Codec::Lx4, Codec::Lxe] {
        let (slot, encoded) = encode(codec, &geometry, &block);
        assert!(matches!(encoded, Encoded::Fits { escapes: 0, .. }), "{encoded:?}");
        assert_eq!(decoded(&geometry, &slot), block);
    }
}

/// Every exponent a window below the largest, so that all but one row are escapes.
#[test]
fn lxe_lists_as_many_escapes_as_there_are_and_refuses_what_would_not_shrink() {
    let geometry = geometry(1, 3, 32, 16, Dtype::Bf16);
    let plane = geometry.plane_elements();
    // In some planes only, at the beginning, in the middle, at the end; the rest is of one exponent.
    let mut block: Vec<u16> = (0..geometry.elements()).map(|i| 0x3f80 | i as u16 & 0x7f).collect();
    for (n, i) in (0..plane / 2).map(|n| (n, 7 * n % plane)) {
        block[i] = n as u16 & 0x7f;
        block[3 * plane + i] = 0x8000 | (n as u16) << 7 & 0x1fff;
    }
    block[6 * plane - 1] = 0;
    let (slot, encoded) = encode(Codec::Lxe, &geometry, &block);
    let Encoded::Fits { escapes, .. } = encoded else { panic!("{encoded:?}") };
    assert!(escapes as usize > plane / 2, "{escapes}");
    assert_eq!(decoded(&geometry, &slot), block);
    // Any bits.
    let mut state = 9u32;
    block.iter_mut().for_each(|element| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *element = (state >> 16) as u16;
    });
    let (slot, encoded) = encode(Codec::Lxe, &geometry, &block);
    let Encoded::RawFallback(Fallback::Streams { needed, capacity }) = encoded else {
        panic!("{encoded:?}")
    };
    assert!(needed > capacity && capacity == geometry.elements() / 2);
    refused(&geometry, &slot);
}

/// One to nine planes of K and of V: lanes that are full, and lanes that are left over.
#[test]
fn lxe_keeps_planes_apart() {
    for (layers, heads) in [(1, 1), (1, 3), (2, 2), (5, 1), (3, 3)] {
        for dim in [16, 80, 256] {
            let geometry = geometry(layers, heads, dim, 8, Dtype::Bf16);
            let mut block = keys_and_values(&geometry, u64::from(dim), true);
            // Planes of different magnitude, a few of zeros.
            for (plane, elements) in block.chunks_exact_mut(geometry.plane_elements()).enumerate() {
                let scale = |x: u16| x.saturating_sub((plane as u16 % 5) << 9);
                elements.iter_mut().for_each(|x| *x = if plane % 7 == 3 { 0 } else { scale(*x) });
            }
            let (slot, encoded) = encode(Codec::Lxe, &geometry, &block);
            assert!(matches!(encoded, Encoded::Fits { .. }), "{geometry}: {encoded:?}");
            assert_eq!(decoded(&geometry, &slot), block, "{geometry}");
        }
    }
}

#[test]
fn escapes_are_listed_until_the_list_is_full() {
    let geometry = geometry(1, 4, 64, 16, Dtype::Bf16);
    let mut block = keys_and_values(&geometry, 5, false);
    // Nothing below 2^-7, so that zeros are what is outside of the windows; this geometry lists 16.
    block.iter_mut().for_each(|x| *x = *x & 0x8000 | (*x & 0x7fff).max(0x3c00));
    let (_, encoded) = encode(Codec::Lx4, &geometry, &block);
    let Encoded::Fits { escapes: 0, .. } = encoded else { panic!("{encoded:?}") };
    for n in 1..=16 {
        block[(n * 509) % 8192] = if n % 2 == 0 { 0 } else { 0x8000 };
        let (slot, encoded) = encode(Codec::Lx4, &geometry, &block);
        assert!(matches!(encoded, Encoded::Fits { escapes, .. } if escapes as usize == n));
        assert_eq!(decoded(&geometry, &slot), block);
    }
    block[0] = 0;
    let (slot, encoded) = encode(Codec::Lx4, &geometry, &block);
    let full = Fallback::Escapes { needed: 17, capacity: 16 };
    assert_eq!(encoded, Encoded::RawFallback(full));
    refused(&geometry, &slot);
}

#[test]
fn blocks_of_zeros_are_exact_and_those_of_one_value_nearly() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let geometry = small(dtype);
        for value in [0.0, 1.0, -0.375] {
            let block = vec![round::nearest(dtype, value); geometry.elements()];
            for codec in codecs_of(dtype) {
                // One value is a single spike in the rotated space, which takes all of the range.
                let bound = if codec == Codec::Int4 { 1.0 / 32.0 } else { 1.0 / 256.0 };
                let (slot, _) = encode(codec, &geometry, &block);
                for bits in decoded(&geometry, &slot) {
                    let restored = round::to_f32(dtype, bits);
                    assert!((restored - value).abs() <= bound * value.abs(), "{codec}: {restored}");
                }
            }
        }
    }
}

#[test]
fn lossy_codecs_hold_finite_elements_only() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let geometry = small(dtype);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut block = keys_and_values(&geometry, 1, false);
            block[77] = round::nearest(dtype, value);
            for codec in codecs_of(dtype) {
                let (slot, encoded) = encode(codec, &geometry, &block);
                if codec.is_exact() {
                    continue;
                }
                assert_eq!(encoded, Encoded::RawFallback(Fallback::NotFinite), "{codec}");
                refused(&geometry, &slot);
            }
        }
        // The largest elements of either sign: held, or refused, but finite.
        let bits = if dtype == Dtype::F16 { 0x7bff } else { 0x7f7f };
        let block: Vec<u16> =
            (0..geometry.elements()).map(|i| bits | ((i % 3 / 2) as u16) << 15).collect();
        for codec in codecs_of(dtype) {
            let (slot, encoded) = encode(codec, &geometry, &block);
            if matches!(encoded, Encoded::Fits { .. }) {
                assert!(decoded(&geometry, &slot).iter().all(|x| round::is_finite(dtype, *x)));
            }
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let geometry = small(dtype);
        let block = keys_and_values(&geometry, 3, false);
        for codec in codecs_of(dtype) {
            let (mut slot, _) = encode(codec, &geometry, &block);
            for bit in 0..8 * slot.len() {
                slot[bit / 8] ^= 1 << (bit % 8);
                let error = verify(&geometry, &slot).unwrap_err();
                assert!(
                    matches!(error.kind(), ErrorKind::Corrupt(_)),
                    "{codec} bit {bit}: {error}"
                );
                slot[bit / 8] ^= 1 << (bit % 8);
            }
            assert!(verify(&geometry, &slot).is_ok());
        }
    }
}

#[test]
fn foreign_slots_say_what_they_are() {
    let geometry = small(Dtype::Bf16);
    let block = keys_and_values(&geometry, 4, false);
    for codec in Codec::ALL {
        let (slot, _) = encode(codec, &geometry, &block);
        let says = |slot: &[u8], words: &str| {
            let message = refused(&geometry, slot);
            assert!(message.contains(words), "{codec}: {message}");
        };
        says(&slot[..slot.len() - 1], "truncated");
        says(&slot[..31], "no header");
        says(b"", "no header");
        let with = |at: usize, byte: u8| {
            let mut slot = slot.clone();
            slot[at] = byte;
            slot
        };
        says(&with(0, b'h'), "magic");
        says(&with(4, 200), "codec 200 is not known");
        says(&with(5, 2), "version 2");
        says(&with(8, 7), "not of 1 layers");
        says(&with(12, 7), "the geometry is none");
        says(&with(6, Dtype::F32.code() as u8), "the geometry is none");
        says(&with(17, 0xff), "bytes");
    }
}

#[test]
fn what_no_slot_can_be_is_refused() {
    let unsupported = |result: Result<Geometry>| {
        assert!(matches!(result.unwrap_err().kind(), ErrorKind::Unsupported { .. }));
    };
    unsupported(Geometry::new(1, 1, 40, 16, Dtype::Bf16));
    unsupported(Geometry::new(1, 1, 272, 16, Dtype::Bf16));
    unsupported(Geometry::new(1, 1, 64, 12, Dtype::Bf16));
    unsupported(Geometry::new(1, 1, 64, 16, Dtype::E4m3));
    unsupported(Geometry::new(0, 1, 64, 16, Dtype::Bf16));
    unsupported(Geometry::new(u32::MAX, u32::MAX, 256, 128, Dtype::Bf16));
    let f16 = small(Dtype::F16);
    assert!(Codec::Lx4.slot_bytes(&f16).is_err());
    assert!(Codec::Lx4.encode(&f16, &vec![0; f16.elements()], &mut [0; 4096]).is_err());
    assert!(Codec::Lxe.slot_bytes(&f16).is_err());
    for codec in codecs_of(Dtype::F16) {
        let bytes = codec.slot_bytes(&f16).unwrap();
        let block = vec![0; f16.elements()];
        assert!(codec.encode(&f16, &block, &mut vec![0; bytes - 1]).is_err());
        assert!(codec.encode(&f16, &block[1..], &mut vec![0; bytes]).is_err());
        assert_eq!(Codec::by_name(codec.name()).unwrap(), codec);
    }
    assert!(Codec::by_name("zip").unwrap_err().to_string().contains("lx4"));
}

#[test]
fn slots_have_the_sizes_that_the_documentation_gives() {
    let geometry = geometry(1, 8, 128, 16, Dtype::Bf16);
    let bits = |codec: Codec| {
        8.0 * codec.slot_bytes(&geometry).unwrap() as f64 / geometry.elements() as f64
    };
    for (codec, expected) in [
        (Codec::Raw, 16.0),
        (Codec::Lx4, 12.2),
        (Codec::Lxe, 12.0),
        (Codec::Fp8(ScalePer::Token), 8.25),
        (Codec::Fp8(ScalePer::Head), 8.0),
        (Codec::Fp8(ScalePer::Tensor), 8.0),
        (Codec::Int8, 9.1),
        (Codec::Int6, 7.1),
        (Codec::Int4, 5.1),
    ] {
        assert!((bits(codec) - expected).abs() < 0.06, "{codec}: {}", bits(codec));
    }
    assert!(16.0 / bits(Codec::Lx4) >= 1.31);
}
