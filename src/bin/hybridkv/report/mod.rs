//! Reports: what `validate`, `bench` and `run` found, as JSON; and `hybridkv report`, which reads them again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use hybridkv::device::{Device, DeviceKind};
use hybridkv::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const OP: &str = "report";
/// Version of the form below.
const SCHEMA: u32 = 1;

/// Arguments of `hybridkv report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Report files, or folders of them (default: validation/reports, if it is there).
    paths: Vec<PathBuf>,
    /// List the reports that were made from other kernels than this build's, and exit with 1 when there
    /// are any.
    #[arg(long)]
    check: bool,
    /// Print every row too: ours beside the machine's limit, the goal and the peers.
    #[arg(long)]
    rows: bool,
}

/// What one suite found on one machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// `validate`, `decode`, `run`, ...
    pub suite: String,
    /// Name of the GPU or the processor.
    pub device: String,
    /// Version of the driver, `none` on the CPU.
    pub driver: String,
    /// CUDA version of the driver, `none` on the CPU.
    pub cuda: String,
    /// Day of the run, UTC.
    pub date: String,
    /// Commit of the build.
    pub commit: String,
    /// SHA-256 of the output of `git ls-files -s kernels` at that commit.
    pub kernels_sha256: String,
    /// The command line that made the report.
    pub command: String,
    /// What the machine itself can do, in GB/s, and the clocks during the run, in MHz.
    pub limits: BTreeMap<String, f64>,
    /// Figures that are no rows, in the suite's own form.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub figures: Value,
    /// One row per case.
    pub rows: Vec<Row>,
}

/// One case.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub case: String,
    /// Our figure.
    pub ours: f64,
    /// Its unit.
    pub unit: String,
    /// Useful bytes over time, where that has a meaning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gbps: Option<f64>,
    /// What the machine's own limit would give, in the same unit: of a decode, the time to read the keys
    /// and values at the measured read rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// What it should reach, in the same unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<f64>,
    /// The figures of others in the same run, in the same unit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<String, f64>,
    /// Errors against the reference, and spreads of timings.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub error: BTreeMap<String, f64>,
    /// The largest error, or the worst figure, that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// Whether it passed.
    pub pass: bool,
    /// What went wrong, or why the case was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Row {
    /// Whether the figure is a time or a size, not a rate.
    pub fn less_is_better(&self) -> bool {
        matches!(self.unit.as_str(), "us" | "ms" | "s" | "B/block" | "%")
    }

    /// Whether our figure is as good as this one.
    pub fn reaches(&self, figure: f64) -> bool {
        self.times_better(figure) >= 1.0
    }

    /// How many times better ours is than this one.
    fn times_better(&self, than: f64) -> f64 {
        if self.less_is_better() { than / self.ours } else { self.ours / than }
    }

    /// The share of the machine's limit that is reached.
    pub fn of_limit(&self) -> Option<f64> {
        self.limit.map(|limit| self.times_better(limit))
    }
}

impl Report {
    /// An empty report of a suite on a device.
    pub fn new(suite: &str, device: &Device) -> Self {
        let info = device.info();
        let (driver, cuda) = match info.kind {
            DeviceKind::Cpu => ("none".to_owned(), "none".to_owned()),
            DeviceKind::Cuda => {
                let version = info.driver_version;
                let driver = nvml_wrapper::Nvml::init().and_then(|nvml| nvml.sys_driver_version());
                (
                    driver.unwrap_or_else(|_| "unknown".to_owned()),
                    format!("{}.{}", version / 1000, version % 1000 / 10),
                )
            }
        };
        let provenance = Provenance::of_this_build();
        Self {
            schema: SCHEMA,
            suite: suite.to_owned(),
            device: info.name.clone(),
            driver,
            cuda,
            date: today(),
            commit: provenance.commit,
            kernels_sha256: provenance.kernels_sha256,
            command: std::env::args().skip(1).fold("hybridkv".to_owned(), |all, a| all + " " + &a),
            limits: BTreeMap::new(),
            figures: Value::Null,
            rows: Vec::new(),
        }
    }

    /// Writes the report as JSON, one line per row.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut head = serde_json::to_value(self).map_err(|e| invalid(e.to_string()))?;
        head["rows"] = Value::Array(Vec::new());
        let rows: Vec<String> = self
            .rows
            .iter()
            .map(|row| serde_json::to_string(row).map_err(|e| invalid(e.to_string())))
            .collect::<Result<_>>()?;
        let rows = format!("\"rows\": [\n    {}\n  ]", rows.join(",\n    "));
        let text = format!("{head:#}\n").replacen("\"rows\": []", &rows, 1);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| io(folder, e))?;
        }
        std::fs::write(path, text).map_err(|e| io(path, e))
    }

    /// Reads a report.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| io(path, e))?;
        serde_json::from_str(&text).map_err(|e| {
            let message = format!("{}: {e}", path.display());
            Error::new(OP, ErrorKind::Parse { line: e.line(), message })
        })
    }

    /// Rows that did not pass.
    pub fn failures(&self) -> usize {
        self.rows.iter().filter(|row| !row.pass).count()
    }
}

/// Reads reports and prints what is in them.
pub fn main(args: &Args) -> Result<ExitCode> {
    let mut files = Vec::new();
    let default = Path::new("validation/reports");
    if args.paths.is_empty() && default.is_dir() {
        collect(default, &mut files)?;
    }
    for path in &args.paths {
        collect(path, &mut files)?;
    }
    files.sort();
    let current = Provenance::of_this_build().kernels_sha256;
    let mut stale = 0;
    println!(
        "{:<44} {:<26} {:<10} {:>5} {:>6}  kernels",
        "report", "device", "date", "rows", "failed"
    );
    for file in &files {
        let report = Report::read(file)?;
        let state = if current == "unknown" {
            "unknown (this build does not know its own)"
        } else if report.kernels_sha256 == current {
            "current"
        } else {
            stale += 1;
            "STALE: made from other kernels"
        };
        println!(
            "{:<44} {:<26} {:<10} {:>5} {:>6}  {state}",
            file.display(),
            report.device,
            report.date,
            report.rows.len(),
            report.failures(),
        );
        if args.rows {
            print_rows(&report);
        }
    }
    if args.check {
        println!("{stale} of {} reports are stale", files.len());
        return Ok(ExitCode::from(u8::from(stale > 0)));
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows of a report as a table. A peer's figure is followed by how many times better ours is.
fn print_rows(report: &Report) {
    println!(
        "  {:<40} {:>9} {:<7} {:>9} {:>7} {:>9}  peers (ours is so many times better)",
        "case", "ours", "", "limit", "of it", "goal"
    );
    for row in &report.rows {
        let figure = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.1}"));
        let of_limit = row.of_limit().map(|share| format!("{:.1}%", 100.0 * share));
        let peers: Vec<String> = row
            .peers
            .iter()
            .map(|(name, &value)| format!("{name} {value:.1} ({:.2}x)", row.times_better(value)))
            .collect();
        let verdict = match (row.pass, &row.note) {
            (true, None) => String::new(),
            (true, Some(note)) => note.clone(),
            (false, note) => format!("FAILED {}", note.as_deref().unwrap_or_default()),
        };
        println!(
            "  {:<40} {:>9.1} {:<7} {:>9} {:>7} {:>9}  {} {verdict}",
            row.case,
            row.ours,
            row.unit,
            figure(row.limit),
            of_limit.as_deref().unwrap_or("-"),
            figure(row.goal),
            peers.join(", "),
        );
    }
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(|e| io(path, e))? {
            let entry = entry.map_err(|e| io(path, e))?.path();
            if entry.is_dir() || entry.extension().is_some_and(|e| e == "json") {
                collect(&entry, files)?;
            }
        }
        return Ok(());
    }
    files.push(path.to_owned());
    Ok(())
}

/// What a build was made from. `cargo xtask` knows, and tells by the variable `HYBRIDKV_PROVENANCE` or, in
/// a bundle, by the file `provenance.json`.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Provenance {
    commit: String,
    kernels_sha256: String,
    dirty: bool,
}

impl Default for Provenance {
    fn default() -> Self {
        Self { commit: "unknown".into(), kernels_sha256: "unknown".into(), dirty: false }
    }
}

impl Provenance {
    fn of_this_build() -> Self {
        let beside = std::env::current_exe().ok().and_then(|exe| {
            let bundle = exe.parent()?.parent()?;
            std::fs::read_to_string(bundle.join("provenance.json")).ok()
        });
        let text = std::env::var("HYBRIDKV_PROVENANCE").ok().or(beside);
        let mut provenance: Self =
            text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        if provenance.dirty {
            provenance.commit += "-dirty";
        }
        provenance
    }
}

/// Today as `2026-01-31`, UTC.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (year, month, day) = civil_date(seconds / 86_400);
    format!("{year}-{month:02}-{day:02}")
}

/// Year, month and day of a number of days since 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

fn invalid(message: String) -> Error {
    Error::invalid(OP, message)
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::new(OP, ErrorKind::Io { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
        assert_eq!(civil_date(20_454), (2026, 1, 1));
    }

    #[test]
    fn a_report_reads_back() {
        let mut report = Report::new("decode", &Device::cpu());
        report.limits.insert("hbm_read".into(), 3090.5);
        for case in ["a", "b"] {
            let error = BTreeMap::from([("relative".to_owned(), 1.5e-3)]);
            let case = case.to_owned();
            report.rows.push(Row { case, ours: 2.0, pass: true, error, ..Row::default() });
        }
        report.rows[1].pass = false;
        let path =
            std::env::temp_dir().join(format!("hybridkv-report-{}.json", std::process::id()));
        report.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let back = Report::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), serde_json::to_value(&report).unwrap());
        assert_eq!(back.failures(), 1);
        assert_eq!(text.matches("\n    {\"case\"").count(), 2, "one line per row:\n{text}");
    }
}
