//! Progress for people: bars on a terminal (indicatif), plain lines elsewhere.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::{Event, Reporter, Unit, Verb};

use super::wording::size;

/// A bar for each piece of work under way; a line for each that ended.
#[derive(Debug)]
pub struct Bars {
    all: MultiProgress,
    bars: Mutex<BTreeMap<u64, Shown>>,
    colour: bool,
}

#[derive(Debug)]
struct Shown {
    bar: ProgressBar,
    verb: Verb,
    subject: String,
    unit: Unit,
    /// Whether a first number was shown. That of a resumed transfer says nothing about its speed.
    moved: bool,
}

impl Shown {
    fn progress(&mut self, done: u64, total: Option<u64>, detail: Option<&str>) {
        if let Some(total) = total.filter(|total| self.bar.length() != Some(*total)) {
            if self.bar.length() == Some(0) {
                self.bar.set_style(style(self.unit, true));
            }
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
        if !std::mem::replace(&mut self.moved, true) {
            self.bar.reset_eta();
        }
        let text = format!("{} {}", self.verb.present(), self.subject);
        self.bar.set_message(detail.map_or_else(|| text.clone(), |why| format!("{text} ({why})")));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn style(unit: Unit, known: bool) -> ProgressStyle {
    let template = match (unit, known) {
        (Unit::Bytes, true) => "  {msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        (Unit::Bytes, false) => "  {spinner} {msg} {bytes} {bytes_per_sec}",
        (Unit::Steps | Unit::Files, true) => "  {msg} {wide_bar} {pos}/{len} {eta}",
        _ => "  {spinner} {msg} {elapsed}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Bars {
    /// Bars on stderr.
    pub fn new(colour: bool) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        Self { all, bars: Mutex::default(), colour }
    }

    fn line(&self, mark: &str, style: &str, text: &str) {
        let mark = if self.colour { format!("\x1b[{style}m{mark}\x1b[0m") } else { mark.to_owned() };
        // With no bar on screen indicatif prints nothing through `println`, so the line is written directly then.
        if locked(&self.bars).is_empty() {
            let _ = writeln!(io::stderr().lock(), "{mark} {text}");
        } else {
            let _ = self.all.println(format!("{mark} {text}"));
        }
    }
}

impl Reporter for Bars {
    fn report(&self, event: &Event) {
        match event {
            Event::Started { id, verb, subject, total, unit } => {
                let bar = self.all.add(ProgressBar::new(total.unwrap_or(0)));
                bar.set_style(style(*unit, total.is_some()));
                bar.set_message(format!("{} {subject}", verb.present()));
                bar.enable_steady_tick(Duration::from_millis(120));
                let shown = Shown { bar, verb: *verb, subject: subject.clone(), unit: *unit, moved: false };
                locked(&self.bars).insert(*id, shown);
            }
            Event::Progressed { id, done, total, detail } => {
                if let Some(shown) = locked(&self.bars).get_mut(id) {
                    shown.progress(*done, *total, detail.as_deref());
                }
            }
            Event::Finished { id, detail } => {
                let ended = locked(&self.bars).remove(id);
                if let Some(Shown { bar, verb, subject, .. }) = ended {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                    self.line("✓", "32", &ended_line(verb, &subject, detail));
                }
            }
            Event::Abandoned { id } => {
                if let Some(Shown { bar, .. }) = locked(&self.bars).remove(id) {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                }
            }
            Event::Waiting { what } => self.line("…", "33", &format!("waiting: {what}")),
            Event::Note { text } => self.line("·", "2", text),
            Event::Warning { text } => self.line("warning:", "33", text),
        }
    }
}

/// `fetched model.gguf (98.4 MB, 1.2 s)`
fn ended_line(verb: Verb, subject: &str, detail: &str) -> String {
    let text = format!("{} {subject}", verb.past());
    if detail.is_empty() { text } else { format!("{text} ({detail})") }
}

/// How often a line reports the progress of one piece of work.
const PACE: Duration = Duration::from_secs(10);

/// Progress as lines, for logs and pipes.
#[derive(Debug)]
pub struct Plain {
    quiet: bool,
    subjects: Mutex<BTreeMap<u64, Spoken>>,
}

#[derive(Debug)]
struct Spoken {
    verb: Verb,
    subject: String,
    unit: Unit,
    /// When the last line was written, and how many units were done then.
    last: (Instant, u64),
}

impl Spoken {
    /// `fetching x: 1.2 GB of 4.8 GB, 100 MB/s, 36 s left`.
    fn line(&mut self, done: u64, total: u64) -> String {
        let (took, more) = (self.last.0.elapsed().as_secs_f64(), done.saturating_sub(self.last.1));
        self.last = (Instant::now(), done);
        let text = format!("{} {}", self.verb.present(), self.subject);
        if self.unit != Unit::Bytes {
            return format!("{text}: {done}/{total}");
        }
        #[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
        let (rate, left) = (more as f64 / took, total.saturating_sub(done) as f64);
        let pace = match rate {
            0.0 => String::new(),
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is not below zero")]
            rate => format!(", {}/s, {:.0} s left", size(rate as u64), left / rate),
        };
        format!("{text}: {} of {}{pace}", size(done), size(total))
    }
}

impl Plain {
    /// Lines on stderr; only warnings if `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, subjects: Mutex::default() }
    }

    fn line(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }
}

impl Reporter for Plain {
    fn report(&self, event: &Event) {
        match event {
            Event::Started { id, verb, subject, unit, .. } => {
                self.line(&format!("{} {subject}", verb.present()));
                let last = (Instant::now(), 0);
                let spoken = Spoken { verb: *verb, subject: subject.clone(), unit: *unit, last };
                locked(&self.subjects).insert(*id, spoken);
            }
            Event::Progressed { id, done, total: Some(total), .. } => {
                if let Some(spoken) = locked(&self.subjects).get_mut(id)
                    && spoken.last.0.elapsed() >= PACE
                {
                    let line = spoken.line(*done, *total);
                    self.line(&line);
                }
            }
            Event::Progressed { .. } => {}
            Event::Finished { id, detail } => {
                if let Some(Spoken { verb, subject, .. }) = locked(&self.subjects).remove(id) {
                    self.line(&ended_line(verb, &subject, detail));
                }
            }
            Event::Abandoned { id } => {
                locked(&self.subjects).remove(id);
            }
            Event::Waiting { what } => self.line(&format!("waiting: {what}")),
            Event::Note { text } => self.line(text),
            Event::Warning { text } => {
                let _ = writeln!(io::stderr().lock(), "warning: {text}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_transfer_is_told_with_rate_and_time_left() {
        let ten_seconds_ago = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let spoken = |unit| Spoken { verb: Verb::Fetch, subject: "x".to_owned(), unit, last: (ten_seconds_ago, 0) };
        let line = spoken(Unit::Bytes).line(1_000_000_000, 5_000_000_000);
        assert!(line.starts_with("fetching x: 1.00 GB of 5.00 GB, ") && line.ends_with("MB/s, 40 s left"), "{line}");
        assert_eq!(spoken(Unit::Steps).line(3, 9), "fetching x: 3/9");
        assert_eq!(spoken(Unit::Bytes).line(0, 9), "fetching x: 0 B of 9 B");
    }

    #[test]
    fn what_is_done_is_told_in_the_past() {
        assert_eq!(ended_line(Verb::Verify, "llama-cpp source", ""), "verified llama-cpp source");
        assert_eq!(ended_line(Verb::Fetch, "a.whl", "30.2 MB, 0.8 s"), "fetched a.whl (30.2 MB, 0.8 s)");
    }

    #[test]
    fn a_bar_learns_its_length_and_keeps_its_unit() {
        let bar = ProgressBar::hidden();
        bar.set_length(0);
        let mut shown = Shown { bar, verb: Verb::Fetch, subject: "x".to_owned(), unit: Unit::Bytes, moved: false };
        shown.progress(5, None, None);
        shown.progress(7, Some(9), Some("HTTP status 503; again in 2.0 s"));
        assert_eq!((shown.bar.position(), shown.bar.length()), (7, Some(9)));
        assert_eq!(shown.bar.message(), "fetching x (HTTP status 503; again in 2.0 s)");
    }
}
