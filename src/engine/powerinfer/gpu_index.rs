//! The GPU index: which neurons of a sparse model lie in GPU memory. PowerInfer looks for it beside the model, as
//! `<model file>.generated.gpuidx`, and reads it without any check of its numbers; without one it runs a Python program of
//! its own through a shell. We make it ourselves, anew for each start: that takes a few milliseconds, and an index that
//! is never kept is never one for another model or another budget.
//!
//! Format (`export_split.py` and `llama_gpu_split_loader` in PowerInfer): a GGUF of version 3 with the magic `PWRI`, and for
//! each layer the tensors `blk.<i>.gpu_idx`, a 1 for each neuron on the GPU, else 0, and `blk.<i>.gpu_bucket`, the numbers of
//! those neurons in rising order. Their type is i32, which had the number 18 when PowerInfer left llama.cpp.

/// Neurons are moved by this many: what PowerInfer's own program does, so the shapes its kernels see are the usual ones.
const BLOCK: usize = 256;
const TYPE_I32: u32 = 18;
const ALIGNMENT: usize = 32;

/// The neurons that go to the GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// For each layer, in rising order.
    pub chosen: Vec<Vec<u32>>,
    /// GPU memory that they take.
    pub size_bytes: u64,
}

/// The busiest neurons of all layers together that fit into `budget_bytes`. `activation` counts how often each neuron of
/// each layer fired; `neuron_bytes` is the size of one neuron in each layer.
///
/// PowerInfer solves an integer program for this. Within a layer the blocks are taken from the busiest neurons down, so
/// when all neurons have one size (they do, unless layers differ in their quantisation), taking blocks by their sum gives
/// exactly its optimum; otherwise it is the usual approximation by sum per byte.
pub fn choose(activation: &[Vec<f64>], neuron_bytes: &[u64], budget_bytes: u64) -> Split {
    let order: Vec<Vec<usize>> = activation.iter().map(|layer| by_activity(layer)).collect();
    let mut blocks = Vec::new();
    for (layer, order) in order.iter().enumerate() {
        for (block, neurons) in order.chunks(BLOCK).enumerate() {
            let sum: f64 = neurons.iter().map(|neuron| activation[layer][*neuron]).sum();
            let bytes = neuron_bytes[layer].saturating_mul(neurons.len() as u64);
            blocks.push((sum / bytes.max(1) as f64, layer, block, bytes));
        }
    }
    // Equal sums are taken in the order of the layers, so the same statistics give the same index.
    blocks.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut split = Split { chosen: vec![Vec::new(); activation.len()], size_bytes: 0 };
    for (_, layer, block, bytes) in blocks {
        if bytes <= budget_bytes - split.size_bytes {
            split.size_bytes += bytes;
            let neurons = order[layer].chunks(BLOCK).nth(block).unwrap_or_default();
            split.chosen[layer].extend(neurons.iter().map(|neuron| *neuron as u32));
        }
    }
    split.chosen.iter_mut().for_each(|layer| layer.sort_unstable());
    split
}

/// Neurons from the busiest down.
fn by_activity(layer: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..layer.len()).collect();
    order.sort_by(|a, b| layer[*b].total_cmp(&layer[*a]).then(a.cmp(b)));
    order
}

/// The file's bytes; `neurons` says how many each layer has.
pub fn to_bytes(split: &Split, neurons: &[usize]) -> Vec<u8> {
    let layers = split.chosen.iter().zip(neurons);
    let tensors: Vec<(String, Vec<i32>)> = layers.enumerate().flat_map(|(layer, of)| tensors(layer, of)).collect();
    let mut file = b"PWRI".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend(3u64.to_le_bytes());
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut entry = |key: &str, kind: u32, value: &[u8]| {
        file.extend([text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat());
    };
    entry("general.architecture", 8, &text("generic.gpu_index"));
    entry("generic.gpu_index.block_count", 4, &(neurons.len() as u32).to_le_bytes());
    // PowerInfer takes an index whose size is at most what it has left: what these neurons take, not the whole budget.
    entry("split.vram_capacity", 10, &split.size_bytes.to_le_bytes());
    let mut offset = 0;
    for (name, numbers) in &tensors {
        file.extend(text(name));
        file.extend(1u32.to_le_bytes());
        file.extend((numbers.len() as u64).to_le_bytes());
        file.extend(TYPE_I32.to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset += (numbers.len() * 4).next_multiple_of(ALIGNMENT);
    }
    file.reserve(offset + ALIGNMENT);
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    for (_, numbers) in &tensors {
        file.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    }
    file
}

/// The two tensors of a layer. PowerInfer drops the bucket of a layer that has none or all of its neurons on the GPU, but
/// reads it before: one row stands in for an empty one, so that no tensor has no bytes.
fn tensors(layer: usize, (chosen, neurons): (&Vec<u32>, &usize)) -> [(String, Vec<i32>); 2] {
    let mut index = vec![0; *neurons];
    chosen.iter().for_each(|neuron| index[*neuron as usize] = 1);
    let mut bucket: Vec<i32> = chosen.iter().map(|neuron| *neuron as i32).collect();
    if bucket.is_empty() {
        bucket.push(0);
    }
    [(format!("blk.{layer}.gpu_idx"), index), (format!("blk.{layer}.gpu_bucket"), bucket)]
}
