//! Values as the command line writes and reads them.

use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::Eviction;
use hybridkv::spec::ModelSpec;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;

/// A preset by name, or a Hugging Face `config.json` by path.
pub fn load_model(name: &str) -> Result<ModelSpec> {
    if !name.ends_with(".json") {
        return ModelSpec::preset(name);
    }
    let text = std::fs::read_to_string(name)
        .map_err(|source| Error::new("model", ErrorKind::Io { path: name.to_string(), source }))?;
    ModelSpec::from_hf_config(&text)
}

/// `8GiB`, `500MB`, `4096`, ...
pub fn parse_bytes(text: &str) -> Result<u64> {
    let refuse = || {
        Error::unsupported("arguments", "number of bytes", text, "e.g. 8GiB, 512MiB, 2GB, 1000000")
    };
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| refuse())?;
    let unit: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(refuse()),
    };
    let bytes = number * unit as f64;
    if bytes >= 1.0 && bytes < (1u64 << 50) as f64 { Ok(bytes as u64) } else { Err(refuse()) }
}

/// An eviction policy by its name.
pub fn parse_eviction(name: &str) -> Result<Eviction, String> {
    let name: StrDeserializer<'_, serde::de::value::Error> = name.into_deserializer();
    Eviction::deserialize(name).map_err(|error| error.to_string())
}

/// `4M`, `65536`, ...: a number with a binary unit.
pub fn parse_count(text: &str) -> Result<u64> {
    let refuse = || Error::unsupported("arguments", "number", text, "e.g. 65536, 512K, 4M, 1G");
    let (digits, unit) = match text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G']) {
        Some(digits) => (digits, text[digits.len()..].to_ascii_lowercase()),
        None => (text, String::new()),
    };
    let shift = match unit.as_str() {
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => 0,
    };
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    number.checked_mul(1 << shift).filter(|&n| n > 0).ok_or_else(refuse)
}

/// A number of bytes with a binary unit.
pub fn format_bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_with_units() {
        for (text, count) in [("4M", 4 << 20), ("512k", 512 << 10), ("1G", 1 << 30), ("7", 7)] {
            assert_eq!(parse_count(text).unwrap(), count);
        }
        for text in ["", "M", "-1", "0", "1.5M", "1T", "99999999999G"] {
            assert!(parse_count(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_read_with_units() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("1.5 MiB", 3 << 19),
            ("2GB", 2_000_000_000),
            ("4096", 4096),
            ("512k", 512 << 10),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes);
        }
        for text in ["", "GiB", "-1GiB", "8 apples", "0", "1e9", "99999TiB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
