//! Reads the attention layers out of a Hugging Face `config.json`.

use serde_json::{Map, Value};

use super::{AttentionKind, LayerSpec, ModelSpec, StateSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Dtype, KvShape};

const OP: &str = "model config";
/// More layers than any model has: a guard against nonsense, not a limit of the crate.
const MAX_LAYERS: u32 = 1 << 16;

/// The object that describes the text model. `null` counts as absent, as in Python.
struct Config<'a>(&'a Map<String, Value>);

impl<'a> Config<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A positive integer.
    fn count(&self, field: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0) {
            Some(n) => Ok(Some(n)),
            None => Err(wrong(field, value, "a positive integer")),
        }
    }

    fn required(&self, field: &str) -> Result<u32> {
        self.count(field)?.ok_or_else(|| missing(field))
    }

    /// A positive number.
    fn number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|&x| x > 0.0 && x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(wrong(field, value, "a positive number")),
        }
    }

    fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong(field, value, "true or false"))
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| wrong(field, value, "a string"))
    }

    fn list(&self, field: &str) -> Result<Option<&'a [Value]>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_array() {
            Some(list) => Ok(Some(list)),
            None => Err(wrong(field, value, "a list")),
        }
    }
}

fn missing(field: &str) -> Error {
    Error::invalid(OP, format!("field `{field}` is missing"))
}

fn wrong(field: &str, value: &Value, wanted: &str) -> Error {
    Error::invalid(OP, format!("field `{field}` is {value}; wanted {wanted}"))
}

pub(super) fn parse(json: &str) -> Result<ModelSpec> {
    let root: Value = serde_json::from_str(json)
        .map_err(|e| Error::new(OP, ErrorKind::Parse { line: e.line(), message: e.to_string() }))?;
    let root =
        Config(root.as_object().ok_or_else(|| Error::invalid(OP, "it is not a JSON object"))?);
    let config = match root.get("text_config") {
        Some(Value::Object(text)) => Config(text),
        Some(other) => return Err(wrong("text_config", other, "an object")),
        None => Config(root.0),
    };
    for field in ["kv_lora_rank", "num_kv_shared_layers"] {
        if let Some(value) = config.get(field).filter(|value| value.as_u64() != Some(0)) {
            return Err(Error::unsupported(
                OP,
                "a model with",
                format!("`{field}` = {value}"),
                "multi-head, multi-query and grouped-query attention, every layer with KV of its own",
            ));
        }
    }
    let model_type = match config.text("model_type")? {
        Some(name) => name,
        None => root.text("model_type")?.unwrap_or("unknown"),
    };
    let num_layers = config.required("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        return Err(Error::unsupported(
            OP,
            "`num_hidden_layers` of",
            num_layers,
            format!("up to {MAX_LAYERS}"),
        ));
    }
    let num_qo_heads = config.required("num_attention_heads")?;
    let num_kv_heads = config.count("num_key_value_heads")?.unwrap_or(num_qo_heads);
    if !num_qo_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::invalid(
            OP,
            format!(
                "field `num_key_value_heads` is {num_kv_heads}; wanted a divisor of the {num_qo_heads} `num_attention_heads`"
            ),
        ));
    }
    let head_dim = match config.count("head_dim")? {
        Some(dim) => dim,
        None => {
            let hidden = config.required("hidden_size")?;
            if !hidden.is_multiple_of(num_qo_heads) {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "field `head_dim` is missing and `hidden_size` {hidden} is no multiple of {num_qo_heads} heads"
                    ),
                ));
            }
            hidden / num_qo_heads
        }
    };
    let shape = KvShape { num_kv_heads, head_dim, dtype: dtype(&root, &config)? };
    // Full layers can have a head shape of their own (Gemma 4).
    let full_shape = KvShape {
        num_kv_heads: config.count("num_global_key_value_heads")?.unwrap_or(num_kv_heads),
        head_dim: config.count("global_head_dim")?.unwrap_or(head_dim),
        ..shape
    };
    if !num_qo_heads.is_multiple_of(full_shape.num_kv_heads) {
        return Err(Error::invalid(
            OP,
            format!(
                "field `num_global_key_value_heads` is {}; wanted a divisor of the {num_qo_heads} `num_attention_heads`",
                full_shape.num_kv_heads
            ),
        ));
    }
    let sm_scale = match config.number("attention_multiplier")? {
        // Its queries and keys are normalised.
        None if model_type.starts_with("gemma4") => 1.0,
        Some(scale) => scale,
        None => {
            config.number("query_pre_attn_scalar")?.unwrap_or(f64::from(head_dim)).sqrt().recip()
        }
    };
    let kinds = kinds(&config, model_type, num_layers)?;
    let layers = kinds.iter().filter_map(|kind| match *kind {
        Layer::Attention(kind) => {
            let shape = if kind == AttentionKind::Full { full_shape } else { shape };
            Some(LayerSpec { kind, sink_tokens: 0, shape })
        }
        Layer::Linear => None,
    });
    let num_states = kinds.iter().filter(|kind| **kind == Layer::Linear).count();
    Ok(ModelSpec {
        name: model_type.to_owned(),
        layers: layers.collect(),
        states: match num_states {
            0 => Vec::new(),
            n => vec![state(&config, shape.dtype)?; n],
        },
        num_qo_heads,
        sm_scale: sm_scale as f32,
        logits_soft_cap: config.number("attn_logit_softcapping")?.unwrap_or(0.0) as f32,
        sink_logits: model_type == "gpt_oss",
        max_model_len: config.required("max_position_embeddings")?,
    })
}

fn dtype(root: &Config<'_>, config: &Config<'_>) -> Result<Dtype> {
    for (config, field) in
        [(config, "torch_dtype"), (config, "dtype"), (root, "torch_dtype"), (root, "dtype")]
    {
        match config.text(field)? {
            None => {}
            Some("bfloat16") => return Ok(Dtype::Bf16),
            Some("float16") => return Ok(Dtype::F16),
            Some(other) => {
                let given = format!("`{other}`");
                return Err(Error::unsupported(OP, field, given, "bfloat16, float16"));
            }
        }
    }
    Ok(Dtype::Bf16)
}

/// One layer of the model.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    Attention(AttentionKind),
    /// Gated linear attention (Qwen3-Next and its successors).
    Linear,
}

/// The state of a linear-attention layer: a key x value matrix per value head in f32, and the last inputs
/// of a convolution over queries, keys and values.
fn state(config: &Config<'_>, dtype: Dtype) -> Result<StateSpec> {
    let field = |name| config.required(name).map(|n| n as usize);
    let keys = field("linear_num_key_heads")?.checked_mul(field("linear_key_head_dim")?);
    let values = field("linear_num_value_heads")?.checked_mul(field("linear_value_head_dim")?);
    let inputs = field("linear_conv_kernel_dim")?.saturating_sub(1);
    let key_dim = field("linear_key_head_dim")?;
    let bytes = || {
        let matrix = values?.checked_mul(key_dim)?.checked_mul(4)?;
        let channels = keys?.checked_mul(2)?.checked_add(values?)?;
        let convolution = channels.checked_mul(inputs)?.checked_mul(dtype.bytes())?;
        matrix.checked_add(convolution)
    };
    let overflow = || Error::invalid(OP, "the recurrent state overflows 64-bit sizes");
    Ok(StateSpec { bytes: bytes().ok_or_else(overflow)? })
}

/// What the layers keep.
fn kinds(config: &Config<'_>, model_type: &str, num_layers: u32) -> Result<Vec<Layer>> {
    let check_length = |field: &str, list: &[Value]| match list.len() == num_layers as usize {
        true => Ok(()),
        false => Err(Error::invalid(
            OP,
            format!("field `{field}` has {} entries for {num_layers} layers", list.len()),
        )),
    };
    let window = config.count("sliding_window")?;
    let chunk = config.count("attention_chunk_size")?;
    if let Some(types) = config.list("layer_types")? {
        check_length("layer_types", types)?;
        return types
            .iter()
            .enumerate()
            .map(|(i, name)| match name.as_str() {
                Some("full_attention") => Ok(Layer::Attention(AttentionKind::Full)),
                Some("sliding_attention") => window
                    .map(|window| Layer::Attention(AttentionKind::Sliding { window }))
                    .ok_or_else(|| missing("sliding_window")),
                Some("chunked_attention") => chunk
                    .map(|chunk| Layer::Attention(AttentionKind::Chunked { chunk }))
                    .ok_or_else(|| missing("attention_chunk_size")),
                Some("linear_attention") => Ok(Layer::Linear),
                _ => Err(Error::unsupported(
                    OP,
                    "layer type",
                    format!("{name} (`layer_types[{i}]`)"),
                    "full_attention, sliding_attention, chunked_attention, linear_attention",
                )),
            })
            .collect();
    }
    if let Some(chunk) = chunk {
        return no_rope(config, num_layers, check_length)?
            .into_iter()
            .map(|full| match full {
                true => Ok(Layer::Attention(AttentionKind::Full)),
                false => Ok(Layer::Attention(AttentionKind::Chunked { chunk })),
            })
            .collect();
    }
    let window = window.filter(|_| !matches!(config.flag("use_sliding_window"), Ok(Some(false))));
    config.flag("use_sliding_window")?;
    let Some(window) = window else {
        return Ok(vec![Layer::Attention(AttentionKind::Full); num_layers as usize]);
    };
    // Every `pattern`-th layer is full. Where the field is left out, its default is the architecture's.
    let pattern =
        match (config.count("sliding_window_pattern")?, config.count("_sliding_window_pattern")?) {
            (Some(n), _) | (None, Some(n)) => Some(n),
            (None, None) => match model_type {
                "gemma2" | "gpt_oss" => Some(2),
                "cohere2" => Some(4),
                "gemma3" | "gemma3_text" => Some(6),
                _ => None,
            },
        };
    let first_windowed = match config.get("max_window_layers") {
        None => 0,
        Some(value) => {
            value.as_u64().ok_or_else(|| wrong("max_window_layers", value, "a number of layers"))?
        }
    };
    Ok((0..num_layers)
        .map(|i| match pattern {
            Some(n) if (i + 1).is_multiple_of(n) => AttentionKind::Full,
            None if u64::from(i) < first_windowed => AttentionKind::Full,
            _ => AttentionKind::Sliding { window },
        })
        .map(Layer::Attention)
        .collect())
}

/// Llama 4: whether each layer has no rotary embedding, which makes it a full one.
fn no_rope(
    config: &Config<'_>,
    num_layers: u32,
    check_length: impl Fn(&str, &[Value]) -> Result<()>,
) -> Result<Vec<bool>> {
    const FIELD: &str = "no_rope_layers";
    // The field says 1 for a layer that has the embedding. An empty list stands for the default.
    if let Some(list) = config.list(FIELD)?.filter(|list| !list.is_empty()) {
        check_length(FIELD, list)?;
        return list
            .iter()
            .map(|value| match value.as_u64() {
                Some(rope @ (0 | 1)) => Ok(rope == 0),
                _ => Err(wrong(FIELD, value, "a list of 0 and 1")),
            })
            .collect();
    }
    let interval = config.count("no_rope_layer_interval")?.unwrap_or(4);
    Ok((0..num_layers).map(|i| (i + 1).is_multiple_of(interval)).collect())
}
