//! Writes the GPU index of a sparse model from its statistics, as the adapter does before a start: a process of its own for a
//! benchmark to measure. `gpu-index FOLDER LAYERS NEURONS BYTES-OF-A-NEURON BUDGET-BYTES OUTPUT`.

use std::path::Path;

use aitools::base::fs;
use aitools::engine::powerinfer::{activation, gpu_index};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [folder, layers, neurons, neuron_bytes, budget_bytes, output] = words.as_slice() else {
        return Err("six words are needed".into());
    };
    let neurons = vec![neurons.parse()?; layers.parse()?];
    let sizes = vec![neuron_bytes.parse()?; neurons.len()];
    let statistics = activation::read_all(Path::new(folder), &neurons)?;
    let split = gpu_index::choose(&statistics, &sizes, budget_bytes.parse()?);
    Ok(fs::write_atomic(Path::new(output), &gpu_index::to_bytes(&split, &neurons))?)
}
