//! Progress for people: bars on a terminal (indicatif), plain lines elsewhere.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::{Event, Reporter, Unit};

/// A bar for each piece of work under way; a line for each that ended.
#[derive(Debug)]
pub struct Bars {
    all: MultiProgress,
    bars: Mutex<BTreeMap<u64, (ProgressBar, String)>>,
    colour: bool,
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
                bar.set_message(format!("{verb} {subject}"));
                bar.enable_steady_tick(Duration::from_millis(120));
                locked(&self.bars).insert(*id, (bar, format!("{verb} {subject}")));
            }
            Event::Progressed { id, done, total, .. } => {
                if let Some((bar, _)) = locked(&self.bars).get(id) {
                    if let Some(total) = total
                        && bar.length() != Some(*total)
                    {
                        if bar.length() == Some(0) {
                            bar.set_style(style(Unit::Steps, true));
                        }
                        bar.set_length(*total);
                    }
                    bar.set_position(*done);
                }
            }
            Event::Finished { id, detail } => {
                let ended = locked(&self.bars).remove(id);
                if let Some((bar, subject)) = ended {
                    bar.finish_and_clear();
                    self.all.remove(&bar);
                    self.line("✓", "32", &ended_line(&subject, detail));
                }
            }
            Event::Abandoned { id } => {
                if let Some((bar, _)) = locked(&self.bars).remove(id) {
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

fn ended_line(subject: &str, detail: &str) -> String {
    if detail.is_empty() { format!("{subject}: done") } else { format!("{subject}: {detail}") }
}

/// How often a plain line tells of a long piece of work.
const PACE: Duration = Duration::from_secs(10);

/// Lines, for logs and pipes.
#[derive(Debug)]
pub struct Plain {
    quiet: bool,
    subjects: Mutex<BTreeMap<u64, (String, Instant)>>,
}

impl Plain {
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
            Event::Started { id, verb, subject, .. } => {
                let text = format!("{verb} {subject}");
                self.line(&text);
                locked(&self.subjects).insert(*id, (text, Instant::now()));
            }
            Event::Progressed { id, done, total: Some(total), .. } => {
                if let Some((text, last)) = locked(&self.subjects).get_mut(id)
                    && last.elapsed() >= PACE
                {
                    *last = Instant::now();
                    self.line(&format!("{text}: {done}/{total}"));
                }
            }
            Event::Progressed { .. } => {}
            Event::Finished { id, detail } => {
                if let Some((text, _)) = locked(&self.subjects).remove(id) {
                    self.line(&ended_line(&text, detail));
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
