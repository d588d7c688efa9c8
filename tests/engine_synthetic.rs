//! Synthetic keys, values and queries: every device gives the bits of the definition.

use hybridkv::device::{Device, Span};
use hybridkv::error::ErrorKind;
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::{Distribution, SyntheticArgs, Tensor, history};

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu_deferred(1)];
    match Device::cuda(0) {
        Ok(device) => devices.push(device),
        Err(error) => eprintln!("SKIPPED: no CUDA device ({error})"),
    }
    devices
}

#[test]
fn every_device_gives_the_bits_of_the_definition() {
    for device in devices() {
        let kernels = match Kernels::load(&device) {
            Ok(kernels) => kernels,
            Err(error) => {
                eprintln!("SKIPPED: no kernels ({error})");
                continue;
            }
        };
        let stream = device.stream().unwrap();
        for (dtype, num_kv_heads, num_qo_heads, head_dim, num_tokens, layer) in [
            (Dtype::Bf16, 1, 5, 128, 300, 47),
            (Dtype::F16, 4, 16, 64, 33, 0),
            (Dtype::Bf16, 2, 2, 256, 1, 3),
            (Dtype::Bf16, 8, 40, 96, 70, 12),
        ] {
            let mut hash = 99;
            let hashes: Vec<u64> = (0..num_tokens)
                .map(|token| {
                    hash = history(hash, token * 7);
                    hash
                })
                .collect();
            let distribution = Distribution::embedded(dtype).unwrap();
            let device_hashes = device.upload(&hashes).unwrap();
            let device_distribution = device.upload(distribution.elements()).unwrap();
            let tensor = |heads: u32| {
                device.alloc((num_tokens * heads * head_dim) as usize * dtype.bytes()).unwrap()
            };
            let (q, k, v) = (tensor(num_qo_heads), tensor(num_kv_heads), tensor(num_kv_heads));
            let args = SyntheticArgs {
                hashes: device_hashes.span(),
                distribution: device_distribution.span(),
                q: q.span(),
                k_new: k.span(),
                v_new: v.span(),
                shape: KvShape { num_kv_heads, head_dim, dtype },
                num_qo_heads,
                layer,
                num_tokens,
            };
            // SAFETY: all buffers outlive the synchronisation.
            unsafe { kernels.synthetic(&args, stream.as_ref()).unwrap() };
            stream.as_ref().synchronize().unwrap();
            for (which, heads, buffer) in [
                (Tensor::Q, num_qo_heads, q),
                (Tensor::K, num_kv_heads, k),
                (Tensor::V, num_kv_heads, v),
            ] {
                let have = buffer.download::<u16>().unwrap();
                let mut want = vec![0; head_dim as usize];
                for (row, have) in have.chunks_exact(head_dim as usize).enumerate() {
                    let (token, head) = (row / heads as usize, row as u32 % heads);
                    distribution.fill(hashes[token], layer, which, head, &mut want);
                    assert_eq!(have, want, "{which:?} of token {token}, head {head}");
                }
            }
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let device = Device::cpu();
    let kernels = Kernels::load(&device).unwrap();
    let stream = device.stream().unwrap();
    let memory = device.alloc(1 << 20).unwrap();
    let good = SyntheticArgs {
        hashes: memory.span(),
        distribution: memory.span(),
        q: memory.span(),
        k_new: memory.span(),
        v_new: memory.span(),
        shape: KvShape { num_kv_heads: 1, head_dim: 64, dtype: Dtype::Bf16 },
        num_qo_heads: 1,
        layer: 0,
        num_tokens: 2,
    };
    let shape = |head_dim, dtype| KvShape { head_dim, dtype, ..good.shape };
    let short = Span::new(memory.address(), 255);
    let misaligned = Span::new(memory.address() + 8, 1 << 19);
    for (bad, unsupported) in [
        (SyntheticArgs { shape: shape(60, Dtype::Bf16), ..good }, true),
        (SyntheticArgs { shape: shape(0, Dtype::Bf16), ..good }, true),
        (SyntheticArgs { shape: shape(64, Dtype::F32), ..good }, true),
        (SyntheticArgs { q: short, ..good }, false),
        (SyntheticArgs { k_new: misaligned, ..good }, false),
        (SyntheticArgs { hashes: Span::default(), ..good }, false),
        (SyntheticArgs { num_qo_heads: u32::MAX, ..good }, false),
    ] {
        // SAFETY: refused before anything is launched.
        let error = unsafe { kernels.synthetic(&bad, stream.as_ref()) }.unwrap_err();
        let is_unsupported = matches!(error.kind(), ErrorKind::Unsupported { .. });
        assert_eq!(is_unsupported, unsupported, "{error}");
    }
    // No tokens: nothing to do, whatever the pointers.
    let none = SyntheticArgs { num_tokens: 0, hashes: Span::default(), ..good };
    // SAFETY: nothing is launched.
    unsafe { kernels.synthetic(&none, stream.as_ref()).unwrap() };
}
