//! Measures whole processes, several contenders in turn, so that what the machine does meanwhile hits all of them alike.
//!
//! Nothing here judges: no number makes a run fail.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde::Serialize;
use wait4::Wait4 as _;

use crate::step::Result;

/// One run. `first_output_s` is when the first byte came on standard output.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Sample {
    pub wall_s: f64,
    /// User and system time, waited-for children included.
    pub cpu_s: f64,
    /// The largest resident set of the process or any waited-for child. Not below this program's own: see `floor_bytes`.
    pub peak_rss_bytes: u64,
    pub first_output_s: Option<f64>,
    /// Tokens of an answer, where there is one.
    pub tokens_per_s: Option<f64>,
    /// From when the server had sent the last byte to the end of the process, for downloads.
    pub tail_s: Option<f64>,
}

/// Something that can be run again and again.
pub struct Contender<'a> {
    pub name: String,
    /// Before each run, unmeasured.
    pub prepare: Box<dyn FnMut() -> Result<()> + 'a>,
    pub run: Box<dyn FnMut() -> Result<Sample> + 'a>,
}

impl std::fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contender").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<'a> Contender<'a> {
    /// A command with nothing to prepare.
    pub fn command(name: &str, command: impl Fn() -> Command + 'a) -> Self {
        Self::prepared(name, || Ok(()), command)
    }

    pub fn prepared(name: &str, prepare: impl FnMut() -> Result<()> + 'a, command: impl Fn() -> Command + 'a) -> Self {
        let label = name.to_owned();
        Self {
            name: name.to_owned(),
            prepare: Box::new(prepare),
            run: Box::new(move || measure(command()).map_err(|error| format!("{label}: {error}").into())),
        }
    }

    /// Completes each sample with what only the benchmark knows.
    pub fn noting(self, note: impl Fn(&mut Sample) + 'a) -> Self {
        let mut run = self.run;
        let noted = move || {
            let mut sample = run()?;
            note(&mut sample);
            Ok(sample)
        };
        Self { run: Box::new(noted), ..self }
    }
}

/// Runs a command to its end. A command that fails is an error, with the end of its words.
pub fn measure(command: Command) -> Result<Sample> {
    measure_with_words(command).map(|(sample, _, _)| sample)
}

/// [`measure`], and what came on standard output and standard error: the first MiB of it.
pub fn measure_with_words(mut command: Command) -> Result<(Sample, String, String)> {
    const KEPT: usize = 1 << 20;
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut out, mut err) = (child.stdout.take().ok_or("no stdout")?, child.stderr.take().ok_or("no stderr")?);
    let complaints = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = err.read_to_end(&mut bytes);
        bytes
    });
    let (mut buffer, mut first, mut words) = ([0u8; 1 << 16], None, Vec::new());
    loop {
        let count = out.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
        words.extend_from_slice(&buffer[..count.min(KEPT.saturating_sub(words.len()))]);
    }
    let used = child.wait4()?;
    let wall_s = begun.elapsed().as_secs_f64();
    let complaints = complaints.join().map_err(|_| "the reader of stderr died")?;
    let complaints = String::from_utf8_lossy(&complaints).into_owned();
    if !used.status.success() {
        let tail: Vec<&str> = complaints.lines().rev().take(15).collect();
        return Err(
            format!("{command:?}: {}\n{}", used.status, tail.into_iter().rev().collect::<Vec<_>>().join("\n")).into()
        );
    }
    let cpu_s = (used.rusage.utime + used.rusage.stime).as_secs_f64();
    let peak_rss_bytes = used.rusage.maxrss;
    let sample = Sample { wall_s, cpu_s, peak_rss_bytes, first_output_s: first, ..Sample::default() };
    Ok((sample, String::from_utf8_lossy(&words).into_owned(), complaints))
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, min, max })
    }
}

/// All runs of one contender.
#[derive(Debug, Serialize)]
pub struct Series {
    pub name: String,
    pub summary: BTreeMap<&'static str, Spread>,
    /// The first contender's wall time over this one's, run by run: below 1 means that the first is faster.
    pub first_over_this: Option<Spread>,
    pub samples: Vec<Sample>,
}

/// A B C, C B A, A B C, …: `rounds` times, after one unmeasured round if there is to be a warm-up. To and fro, so that nobody
/// always comes after the same one: what that left in the system's memory costs or helps the next.
pub fn interleave(contenders: &mut [Contender<'_>], warm_up: bool, rounds: usize) -> Result<Vec<Series>> {
    let mut samples: Vec<Vec<Sample>> = contenders.iter().map(|_| Vec::new()).collect();
    for round in usize::from(!warm_up)..=rounds {
        for turn in 0..contenders.len() {
            let at = if round % 2 == 0 { turn } else { contenders.len() - 1 - turn };
            (contenders[at].prepare)()?;
            let sample = (contenders[at].run)()?;
            if round > 0 {
                samples[at].push(sample);
            }
        }
    }
    let first = samples.first().cloned().unwrap_or_default();
    let named = contenders.iter().map(|contender| contender.name.clone()).zip(samples);
    Ok(named.map(|(name, samples)| series(name, samples, &first)).collect())
}

fn series(name: String, samples: Vec<Sample>, first: &[Sample]) -> Series {
    let mut summary = BTreeMap::new();
    let mut add = |key, values: Vec<f64>| {
        if let Some(spread) = Spread::of(values.into_iter()) {
            summary.insert(key, spread);
        }
    };
    add("wall_s", samples.iter().map(|sample| sample.wall_s).collect());
    add("cpu_s", samples.iter().map(|sample| sample.cpu_s).collect());
    #[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
    add("peak_rss_bytes", samples.iter().map(|sample| sample.peak_rss_bytes as f64).collect());
    add("first_output_s", samples.iter().filter_map(|sample| sample.first_output_s).collect());
    add("tokens_per_s", samples.iter().filter_map(|sample| sample.tokens_per_s).collect());
    add("tail_s", samples.iter().filter_map(|sample| sample.tail_s).collect());
    let ratios = first.iter().zip(&samples).map(|(ours, theirs)| ours.wall_s / theirs.wall_s);
    Series { first_over_this: Spread::of(ratios), name, summary, samples }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn the_middle_of_odd_and_even() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn contenders_take_turns_after_a_warm_up() {
        let order = RefCell::new(String::new());
        let contender = |name: &'static str, wall_s| Contender {
            name: name.to_owned(),
            prepare: Box::new(|| Ok(())),
            run: Box::new({
                let order = &order;
                move || {
                    order.borrow_mut().push_str(name);
                    Ok(Sample { wall_s, ..Sample::default() })
                }
            }),
        };
        let series = interleave(&mut [contender("a", 1.0), contender("b", 4.0)], true, 2).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
        assert_eq!(series[1].samples.len(), 2);
        assert_eq!(series[1].first_over_this.unwrap().median, 0.25);
    }

    #[test]
    fn a_process_is_measured_and_a_failure_is_told() {
        let cargo = || Command::new("cargo");
        let mut version = cargo();
        version.arg("--version");
        let sample = measure(version).unwrap();
        assert!(sample.wall_s > 0.0 && sample.first_output_s.is_some());
        let mut bad = cargo();
        bad.arg("no-such-subcommand");
        assert!(measure(bad).unwrap_err().to_string().contains("no-such-subcommand"));
    }
}
