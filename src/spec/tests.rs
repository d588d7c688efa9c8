use super::*;
use crate::abi;
use crate::layout::Dtype;

const KINDS: [AttentionKind; 7] = [
    AttentionKind::Full,
    AttentionKind::Sliding { window: 1 },
    AttentionKind::Sliding { window: 2 },
    AttentionKind::Sliding { window: 7 },
    AttentionKind::Chunked { chunk: 1 },
    AttentionKind::Chunked { chunk: 5 },
    AttentionKind::Chunked { chunk: 8 },
];

#[test]
fn skipped_tokens_are_exactly_those_no_later_query_sees() {
    for kind in KINDS {
        for n in 0..40 {
            let skipped = kind.skipped(n);
            assert!(skipped <= n);
            for j in 0..n {
                let visible = (n..80).any(|i| kind.sees(i, j));
                assert_eq!(j >= skipped, visible, "{kind:?}, {n} tokens, key {j}");
            }
            assert_eq!(kind.live(n), n - skipped);
        }
    }
}

#[test]
fn live_tokens_of_a_scout_layer() {
    // Research note on capacity: live tokens of a chunk and of a window of 8192.
    let chunked = AttentionKind::Chunked { chunk: 8192 };
    let sliding = AttentionKind::Sliding { window: 8192 };
    let live = |n| (chunked.live(n), sliding.live(n));
    assert_eq!(live(8191), (8191, 8191));
    assert_eq!(live(8192), (0, 8191));
    assert_eq!(live(12288), (4096, 8191));
    assert_eq!(live(16383), (8191, 8191));
}

fn count(spec: &ModelSpec, kind: AttentionKind) -> usize {
    spec.layers.iter().filter(|layer| layer.kind == kind).count()
}

#[test]
fn presets_have_the_capacity_figures_of_their_models() {
    // Full layers, windowed layers, bytes per token when every layer keeps it.
    let expected = [
        ("llama-4-scout", 12, 36, 196_608),
        ("llama-4-maverick", 12, 36, 196_608),
        ("gpt-oss-20b", 12, 12, 49_152),
        ("gpt-oss-120b", 18, 18, 73_728),
        ("gemma-2-9b", 21, 21, 344_064),
        ("gemma-2-27b", 23, 23, 376_832),
        ("gemma-3-1b", 4, 22, 26_624),
        ("gemma-3-4b", 5, 29, 139_264),
        ("gemma-3-12b", 8, 40, 393_216),
        ("gemma-3-27b", 10, 52, 507_904),
        ("gemma-4-31b", 10, 50, 901_120),
        ("qwen3-next-80b-a3b", 12, 0, 24_576),
        ("mistral-7b", 0, 32, 131_072),
        ("llama-3.1-8b", 32, 0, 131_072),
        ("llama-3.1-70b", 80, 0, 327_680),
    ];
    assert!(ModelSpec::preset_names().eq(expected.iter().map(|e| e.0)));
    for (name, full, windowed, bytes) in expected {
        let spec = ModelSpec::preset(name).unwrap();
        assert_eq!(count(&spec, AttentionKind::Full), full, "{name}");
        assert_eq!(spec.layers.len() - full, windowed, "{name}");
        assert_eq!(spec.token_bytes(), bytes, "{name}");
    }
    let err = ModelSpec::preset("llama-5").unwrap_err().to_string();
    assert!(err.contains("llama-5") && err.contains("gemma-3-27b"), "{err}");
}

/// The fields of the public `config.json` files that matter here.
const CONFIGS: &[(&str, &str)] = &[
    (
        "llama-4-scout",
        r#"{"model_type":"llama4","torch_dtype":"bfloat16","text_config":{"model_type":"llama4_text",
        "num_hidden_layers":48,"num_attention_heads":40,"num_key_value_heads":8,"head_dim":128,
        "hidden_size":5120,"attention_chunk_size":8192,"no_rope_layers":[],
        "max_position_embeddings":10485760}}"#,
    ),
    (
        "gpt-oss-20b",
        r#"{"model_type":"gpt_oss","num_hidden_layers":24,"num_attention_heads":64,
        "num_key_value_heads":8,"head_dim":64,"hidden_size":2880,"sliding_window":128,
        "max_position_embeddings":131072}"#,
    ),
    (
        "gemma-2-27b",
        r#"{"model_type":"gemma2","torch_dtype":"bfloat16","num_hidden_layers":46,
        "num_attention_heads":32,"num_key_value_heads":16,"head_dim":128,"hidden_size":4608,
        "sliding_window":4096,"query_pre_attn_scalar":144,"attn_logit_softcapping":50.0,
        "max_position_embeddings":8192}"#,
    ),
    (
        "gemma-3-27b",
        r#"{"model_type":"gemma3","text_config":{"model_type":"gemma3_text","num_hidden_layers":62,
        "num_attention_heads":32,"num_key_value_heads":16,"head_dim":128,"hidden_size":5376,
        "sliding_window":1024,"sliding_window_pattern":6,"query_pre_attn_scalar":168,
        "attn_logit_softcapping":null,"max_position_embeddings":131072}}"#,
    ),
    (
        "mistral-7b",
        r#"{"model_type":"mistral","torch_dtype":"bfloat16","num_hidden_layers":32,
        "num_attention_heads":32,"num_key_value_heads":8,"hidden_size":4096,"sliding_window":4096,
        "max_position_embeddings":32768}"#,
    ),
    (
        "llama-3.1-8b",
        r#"{"model_type":"llama","dtype":"bfloat16","num_hidden_layers":32,"num_attention_heads":32,
        "num_key_value_heads":8,"hidden_size":4096,"max_position_embeddings":131072}"#,
    ),
];

#[test]
fn public_configs_give_the_presets() {
    for (name, json) in CONFIGS {
        let preset = ModelSpec::preset(name).unwrap();
        let parsed = ModelSpec::from_hf_config(json).unwrap();
        assert_eq!(ModelSpec { name: preset.name.clone(), ..parsed }, preset, "{name}");
    }
}

fn edited(edit: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) -> Result<ModelSpec> {
    let mut json: serde_json::Value = serde_json::from_str(CONFIGS[5].1).unwrap();
    edit(json.as_object_mut().unwrap());
    ModelSpec::from_hf_config(&json.to_string())
}

fn with(fields: serde_json::Value) -> Result<ModelSpec> {
    edited(|json| json.extend(fields.as_object().unwrap().clone()))
}

#[test]
fn every_way_to_say_layer_kinds_is_read() {
    use serde_json::json;
    let sliding = AttentionKind::Sliding { window: 64 };
    let mut types = vec!["full_attention"; 32];
    types[3] = "sliding_attention";
    types[4] = "chunked_attention";
    let spec =
        with(json!({"layer_types": types, "sliding_window": 64, "attention_chunk_size": 32}));
    let spec = spec.unwrap();
    assert_eq!(spec.layers[3].kind, sliding);
    assert_eq!(spec.layers[4].kind, AttentionKind::Chunked { chunk: 32 });
    assert_eq!(count(&spec, AttentionKind::Full), 30);

    let spec = with(json!({"sliding_window": 64, "use_sliding_window": false})).unwrap();
    assert_eq!(count(&spec, AttentionKind::Full), 32);
    let spec = with(json!({"sliding_window": 64, "max_window_layers": 28})).unwrap();
    assert_eq!((spec.layers[27].kind, spec.layers[28].kind), (AttentionKind::Full, sliding));
    let spec = with(json!({"sliding_window": 64, "_sliding_window_pattern": 3})).unwrap();
    assert_eq!((spec.layers[1].kind, spec.layers[2].kind), (sliding, AttentionKind::Full));

    let mut rope = vec![1; 32];
    rope[7] = 0;
    let spec = with(json!({"attention_chunk_size": 32, "no_rope_layers": rope})).unwrap();
    assert_eq!(spec.layers[7].kind, AttentionKind::Full);
    assert_eq!(count(&spec, AttentionKind::Full), 1);
    assert_eq!(with(json!({"torch_dtype": "float16"})).unwrap().layers[0].shape.dtype, Dtype::F16);
}

#[test]
fn two_head_shapes_are_read_and_get_equal_blocks() {
    use serde_json::json;
    let types: Vec<&str> =
        (1..=60).map(|i| if i % 6 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    let config = json!({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text",
        "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
        "hidden_size": 5376, "sliding_window": 1024, "layer_types": types,
        "num_kv_shared_layers": 0, "max_position_embeddings": 262_144}});
    let spec = ModelSpec::from_hf_config(&config.to_string()).unwrap();
    let preset = ModelSpec::preset("gemma-4-31b").unwrap();
    assert_eq!(ModelSpec { name: preset.name.clone(), ..spec }, preset);
    let plan = preset.group(16).unwrap();
    // Half the bytes per token, so twice the tokens: nothing is padded.
    assert_eq!((plan.groups[0].block_size, plan.groups[1].block_size), (32, 16));
    assert_eq!(plan.groups.len(), 6);
    assert!(plan.groups.iter().all(|group| group.used_bytes() == plan.block_bytes));
    let mut config = config;
    config["text_config"]["num_kv_shared_layers"] = json!(20);
    let err = ModelSpec::from_hf_config(&config.to_string()).unwrap_err().to_string();
    assert!(err.contains("num_kv_shared_layers"), "{err}");
}

#[test]
fn recurrent_layers_are_read_and_share_blocks_that_have_room() {
    use serde_json::json;
    let types: Vec<&str> =
        (1..=48).map(|i| if i % 4 == 0 { "full_attention" } else { "linear_attention" }).collect();
    let config = json!({"model_type": "qwen3_next", "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048,
        "layer_types": types, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262_144});
    let spec = ModelSpec::from_hf_config(&config.to_string()).unwrap();
    let preset = ModelSpec::preset("qwen3-next-80b-a3b").unwrap();
    assert_eq!(ModelSpec { name: preset.name.clone(), ..spec }, preset);

    let plan = preset.group(128).unwrap();
    assert_eq!((plan.groups.len(), plan.states.len()), (1, 36));
    assert!(plan.states.iter().all(|group| group.used_bytes() <= plan.block_bytes));
    let half = ModelSpec { states: vec![StateSpec { bytes: 1 << 20 }; 36], ..preset.clone() };
    let plan = half.group(128).unwrap();
    assert_eq!((plan.states.len(), plan.states[0].layers.len()), (12, 3));
    let mut layers: Vec<u32> = plan.states.iter().flat_map(|g| g.layers.clone()).collect();
    layers.sort_unstable();
    assert_eq!(layers, (0..36).collect::<Vec<_>>());
    assert!(plan.states.iter().all(|group| group.block_size == 128));

    let err = preset.group(16).unwrap_err();
    assert!(matches!(err.kind(), crate::ErrorKind::CannotUnify { .. }), "{err}");
    let text = err.to_string();
    for part in ["recurrent layers 0, 1, 2", "35", "2146304", "393216", "128 tokens"] {
        assert!(text.contains(part), "{text}");
    }
    for bytes in [0, 1000] {
        let odd = ModelSpec { states: vec![StateSpec { bytes }], ..preset.clone() };
        let err = odd.group(128).unwrap_err();
        assert!(matches!(err.kind(), crate::ErrorKind::CannotUnify { .. }), "{err}");
    }
    assert_eq!(preset.shard(2).unwrap().states[0].bytes, 2_146_304 / 2);
}

#[test]
fn bad_configs_name_the_field() {
    use serde_json::json;
    for field in
        ["num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"]
    {
        let err = edited(|json| drop(json.remove(field))).unwrap_err().to_string();
        assert!(err.contains(field), "{err}");
        let err = with(json!({ field: -3 })).unwrap_err().to_string();
        assert!(err.contains(field), "{err}");
    }
    for (fields, name) in [
        (json!({"sliding_window": 0}), "sliding_window"),
        (json!({"num_key_value_heads": 5}), "num_key_value_heads"),
        (json!({"torch_dtype": "int3"}), "torch_dtype"),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (json!({"layer_types": vec!["mamba"; 32]}), "layer_types[0]"),
        (json!({"layer_types": vec!["sliding_attention"; 32]}), "sliding_window"),
        (json!({"layer_types": vec!["chunked_attention"; 32]}), "attention_chunk_size"),
        (json!({"attention_chunk_size": 64, "no_rope_layers": [1, 2]}), "no_rope_layers"),
        (json!({"attention_chunk_size": 64, "no_rope_layers": vec![2; 32]}), "no_rope_layers"),
        (json!({"kv_lora_rank": 512}), "kv_lora_rank"),
        (json!({"text_config": 3}), "text_config"),
        (json!({"use_sliding_window": 3, "sliding_window": 64}), "use_sliding_window"),
        (json!({"num_hidden_layers": 4_000_000_000u32}), "num_hidden_layers"),
    ] {
        let err = with(fields).unwrap_err().to_string();
        assert!(err.contains(name), "{name}: {err}");
    }
    let err = ModelSpec::from_hf_config("{\n\"a\": }").unwrap_err();
    assert!(matches!(err.kind(), crate::ErrorKind::Parse { line: 2, .. }), "{err}");
}

#[test]
fn ranks_share_heads_and_replicate_what_they_cannot_share() {
    let scout = ModelSpec::preset("llama-4-scout").unwrap();
    let rank = scout.shard(8).unwrap();
    assert_eq!((rank.num_qo_heads, rank.layers[0].shape.num_kv_heads), (5, 1));
    assert_eq!(rank.token_bytes(), 24_576);
    let gemma = ModelSpec::preset("gemma-3-1b").unwrap().shard(4).unwrap();
    assert_eq!((gemma.num_qo_heads, gemma.layers[0].shape.num_kv_heads), (1, 1));
    for tp in [0, 3, 16] {
        assert!(scout.shard(tp).is_err(), "40 query heads over {tp} ranks");
    }
}

fn model(layers: &[(AttentionKind, u32)]) -> ModelSpec {
    let layer = |&(kind, head_dim)| LayerSpec {
        kind,
        sink_tokens: 0,
        shape: KvShape { num_kv_heads: 4, head_dim, dtype: Dtype::Bf16 },
    };
    ModelSpec {
        layers: layers.iter().map(layer).collect(),
        ..ModelSpec::preset("llama-3.1-8b").unwrap()
    }
}

#[test]
fn groups_of_the_presets() {
    // Groups, layers of the largest and of the smallest group.
    for (name, groups, largest, smallest) in [
        ("llama-4-scout", 4, 12, 12),
        ("gpt-oss-20b", 2, 12, 12),
        ("gemma-2-9b", 2, 21, 21),
        ("gemma-3-1b", 7, 4, 3),
        ("gemma-3-27b", 7, 10, 8),
        ("mistral-7b", 1, 32, 32),
        ("llama-3.1-70b", 1, 80, 80),
    ] {
        let spec = ModelSpec::preset(name).unwrap();
        let plan = spec.group(16).unwrap();
        assert_eq!(plan.groups.len(), groups, "{name}");
        let sizes = || plan.groups.iter().map(|group| group.layers.len());
        assert_eq!((sizes().max(), sizes().min()), (Some(largest), Some(smallest)), "{name}");
        // Every layer has one slot, and its row of the window table says so.
        let table = plan.window_table();
        assert_eq!(table.len(), spec.layers.len());
        for (layer, row) in table.iter().enumerate() {
            let group = &plan.groups[row.group as usize];
            assert_eq!(group.layers[row.layer_slot as usize], layer as u32);
            assert_eq!(group.kind, spec.layers[layer].kind);
            let (kind, extent) = match group.kind {
                AttentionKind::Full => (abi::HKV_LAYER_FULL, 0),
                AttentionKind::Sliding { window } => (abi::HKV_LAYER_SLIDING, window),
                AttentionKind::Chunked { chunk } => (abi::HKV_LAYER_CHUNKED, chunk),
            };
            assert_eq!((row.kind, row.extent), (kind as i32, extent as i32));
        }
    }
    let scout = ModelSpec::preset("llama-4-scout").unwrap().shard(8).unwrap().group(16).unwrap();
    assert_eq!(scout.block_bytes, 98_304);
    assert_eq!(scout.groups[0].kind, AttentionKind::Full);
    assert_eq!(scout.groups[1].layers, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44]);
}

#[test]
fn a_slightly_larger_bucket_sets_the_group_size() {
    let sliding = AttentionKind::Sliding { window: 128 };
    let mut layers = vec![(AttentionKind::Full, 64); 13];
    layers.extend(vec![(sliding, 64); 12]);
    let plan = model(&layers).group(16).unwrap();
    assert_eq!(plan.groups.len(), 2);
    assert_eq!((plan.groups[1].layers.len(), plan.groups[1].layer_slots), (12, 13));
    // At half as much again the smaller one does.
    layers.extend(vec![(AttentionKind::Full, 64); 5]);
    assert_eq!(model(&layers).group(16).unwrap().groups.len(), 3);
}

#[test]
fn unequal_shapes_get_equal_blocks() {
    let sliding = AttentionKind::Sliding { window: 128 };
    let plan = model(&[(AttentionKind::Full, 64), (sliding, 128)]).group(16).unwrap();
    assert_eq!((plan.groups[0].block_size, plan.groups[1].block_size), (32, 16));
    assert!(plan.groups.iter().all(|group| group.used_bytes() == plan.block_bytes));
    // 96 is no power of two times 64, and 128 tokens is the largest block: both are padded.
    for (dims, block_size, scaled) in [((64, 96), 16, 16), ((64, 256), 64, 128)] {
        let plan =
            model(&[(AttentionKind::Full, dims.0), (sliding, dims.1)]).group(block_size).unwrap();
        assert_eq!(plan.groups[0].block_size, scaled);
        assert_eq!(plan.block_bytes, plan.groups[1].used_bytes());
        assert!(plan.groups[0].used_bytes() < plan.block_bytes);
    }
    for block_size in [0, 4, 24, 256] {
        assert!(model(&[(sliding, 64)]).group(block_size).is_err());
    }
    assert!(model(&[]).group(16).is_err());
    assert!(model(&[(AttentionKind::Chunked { chunk: 0 }, 64)]).group(16).is_err());
}
