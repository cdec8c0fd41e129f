//! Figures of a benchmark that does not run whole processes: taken in every round, told beside the bound that the project has set
//! itself.

use std::time::Duration;

use serde::Serialize;

use super::measure::Spread;

/// One figure.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub name: String,
    pub unit: &'static str,
    /// What it is at most, or at least, by the project's own aim.
    pub aim: Option<&'static str>,
    /// Over the rounds.
    pub spread: Option<Spread>,
    pub rounds: Vec<f64>,
    /// Observations that a round's value is made of, in all rounds together.
    pub count: usize,
}

/// The figures of a benchmark, in the order in which they were first taken.
#[derive(Debug, Default)]
pub struct Figures(Vec<Figure>);

impl Figures {
    /// Adds the value of one round, made of `count` observations.
    pub fn add(&mut self, name: &str, unit: &'static str, value: f64, count: usize) {
        match self.0.iter_mut().find(|figure| figure.name == name) {
            Some(figure) => {
                figure.rounds.push(value);
                figure.count += count;
            }
            None => {
                let (name, rounds) = (name.to_owned(), vec![value]);
                self.0.push(Figure { name, unit, aim: None, spread: None, rounds, count });
            }
        }
    }

    /// The observations of a figure so far.
    pub fn count(&self, name: &str) -> usize {
        self.0.iter().find(|figure| figure.name == name).map_or(0, |figure| figure.count)
    }

    /// Says what a figure is meant to be.
    pub fn aim(&mut self, name: &str, aim: &'static str) {
        if let Some(figure) = self.0.iter_mut().find(|figure| figure.name == name) {
            figure.aim = Some(aim);
        }
    }

    pub fn finish(mut self) -> Vec<Figure> {
        for figure in &mut self.0 {
            figure.spread = Spread::of(figure.rounds.iter().copied());
        }
        self.0
    }
}

/// The value that `percent` of all values do not exceed, in milliseconds.
pub fn percentile_ms(values: &[Duration], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map_or(f64::NAN, |value| value.as_secs_f64() * 1e3)
}

/// A table for a terminal.
pub fn table(figures: &[Figure]) -> String {
    let mut rows = vec![["", "median", "min", "max", "", "aim", "observations"].map(str::to_owned)];
    for figure in figures {
        let value = |pick: fn(&Spread) -> f64| figure.spread.as_ref().map_or_else(String::new, |at| shown(pick(at)));
        rows.push([
            figure.name.clone(),
            value(|spread| spread.median),
            value(|spread| spread.min),
            value(|spread| spread.max),
            figure.unit.to_owned(),
            figure.aim.unwrap_or_default().to_owned(),
            figure.count.to_string(),
        ]);
    }
    super::aligned(&rows)
}

fn shown(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.3}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile_ms(&values, percent)), [100.0, 198.0, 200.0]);
        assert_eq!(percentile_ms(&values[..1], 50), 200.0);
        assert!(percentile_ms(&[], 50).is_nan());
    }

    #[test]
    fn rounds_add_up() {
        let mut figures = Figures::default();
        for (value, count) in [(3.0, 10), (1.0, 20), (2.0, 30)] {
            figures.add("a", "ms", value, count);
        }
        figures.aim("a", "<= 2");
        let figures = figures.finish();
        assert_eq!((figures[0].spread.unwrap().median, figures[0].count), (2.0, 60));
        assert!(table(&figures).contains("<= 2"), "{}", table(&figures));
    }
}
