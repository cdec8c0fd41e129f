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

/// What the smallest block of a layer takes, in bytes: with less, no neuron goes to the GPU.
pub fn smallest_block(neurons: usize, neuron_bytes: u64) -> u64 {
    let last = neurons % BLOCK;
    neuron_bytes.saturating_mul(if last == 0 { BLOCK } else { last } as u64)
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
        numbers.iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf::{Header, Magic, Tensor};

    /// The size and the tensors of an index, read back.
    fn read(file: &[u8]) -> (u64, Vec<(String, Vec<i32>)>) {
        let header = Header::parse(file, Some(file.len() as u64)).unwrap();
        assert_eq!((header.magic, header.version), (Magic::Pwri, 3));
        assert_eq!(header.architecture(), Some("generic.gpu_index"));
        assert_eq!(header.block_count(), Some(header.tensors.len() as u64 / 2));
        header.check_extents(file.len() as u64).unwrap();
        let read = |tensor: &Tensor| {
            assert_eq!((tensor.tensor_type().unwrap().name, tensor.shape.len()), ("I32", 1));
            let begin = (header.data_offset + tensor.offset) as usize;
            let bytes = &file[begin..][..tensor.size_bytes as usize];
            let numbers = bytes.chunks_exact(4).map(|part| i32::from_le_bytes(part.try_into().unwrap()));
            (tensor.name.clone(), numbers.collect())
        };
        (header.uint("split.vram_capacity").unwrap(), header.tensors.iter().map(read).collect())
    }

    /// Layers of which each block of 256 neurons has one number; the first neuron of it a little more.
    fn layers(blocks: &[&[f64]]) -> Vec<Vec<f64>> {
        let layer = |blocks: &&[f64]| -> Vec<f64> { blocks.iter().flat_map(|sum| vec![*sum; BLOCK]).collect() };
        blocks.iter().map(layer).collect()
    }

    #[test]
    fn what_is_written_reads_back() {
        let activation = layers(&[&[1.0, 9.0, 2.0], &[3.0, 0.0, 0.5]]);
        let split = choose(&activation, &[10, 10], 256 * 10 * 2);
        let (capacity, tensors) = read(&to_bytes(&split, &[768, 768]));
        assert_eq!(capacity, 256 * 10 * 2);
        let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["blk.0.gpu_idx", "blk.0.gpu_bucket", "blk.1.gpu_idx", "blk.1.gpu_bucket"]);
        for (layer, busiest) in [(0, 256..512), (1, 0..256)] {
            let expected: Vec<i32> = (0..768).map(|neuron| i32::from(busiest.contains(&neuron))).collect();
            assert_eq!(tensors[layer * 2].1, expected);
            assert_eq!(tensors[layer * 2 + 1].1, busiest.collect::<Vec<i32>>());
        }
    }

    #[test]
    fn budgets() {
        let activation = layers(&[&[1.0, 9.0], &[3.0, 0.0]]);
        let counts = |budget| -> Vec<usize> {
            let split = choose(&activation, &[10, 10], budget);
            assert!(split.size_bytes <= budget);
            assert_eq!(split.size_bytes, 10 * split.chosen.iter().map(Vec::len).sum::<usize>() as u64);
            split.chosen.iter().map(Vec::len).collect()
        };
        let block = 256 * 10;
        for (budget, expected) in [
            (0, [0, 0]),
            (block - 1, [0, 0]),
            (block, [256, 0]),
            (2 * block, [256, 256]),
            (3 * block, [512, 256]),
            (4 * block - 1, [512, 256]),
            (u64::MAX, [512, 512]),
        ] {
            assert_eq!(counts(budget), expected, "{budget}");
        }
        for neurons in [44, 256, 300, 512] {
            let smallest = smallest_block(neurons, 10);
            let taken = |budget| choose(&[vec![1.0; neurons]], &[10], budget).size_bytes;
            assert_eq!((taken(smallest - 1), taken(smallest)), (0, smallest), "{neurons}");
        }
    }

    #[test]
    fn odd_layers_and_odd_sizes() {
        // 300 neurons: a block of 256 and one of 44.
        let split = choose(&[vec![1.0; 300], vec![2.0; 300]], &[10, 100], 300 * 10 + 44 * 100);
        assert_eq!(split.chosen.iter().map(Vec::len).collect::<Vec<_>>(), [300, 44]);
        let split = choose(&[vec![], vec![0.0; 4]], &[0, 1], 4);
        assert_eq!(split.chosen, [vec![], vec![0, 1, 2, 3]]);
    }

    /// No other choice of blocks that fits has a larger sum: tried against all of them.
    #[test]
    fn the_choice_is_the_best_there_is() {
        let sums = [[5.0, 1.0, 4.0], [7.0, 2.0, 2.0], [3.0, 6.0, 0.0]];
        let activation = layers(&[&sums[0], &sums[1], &sums[2]]);
        for fit in 0..=9u32 {
            let split = choose(&activation, &[3; 3], u64::from(fit) * 256 * 3);
            let sum = |(layer, neurons): (usize, &Vec<u32>)| -> f64 {
                neurons.iter().map(|neuron| activation[layer][*neuron as usize]).sum()
            };
            let ours: f64 = split.chosen.iter().enumerate().map(sum).sum();
            let all = sums.concat();
            let choices = (0..1u32 << 9).filter(|choice| choice.count_ones() <= fit);
            let of = |choice: u32| (0..9).filter(|at| choice >> at & 1 == 1).map(|at| all[at] * 256.0).sum::<f64>();
            let best = choices.map(of).fold(0.0, f64::max);
            assert_eq!(ours, best, "{fit} blocks");
        }
    }

    #[test]
    fn a_large_model_fills_its_budget() {
        let neurons = [11008; 32];
        let activation: Vec<Vec<f64>> = (0..32u64)
            .map(|layer| (0..11008u64).map(|at| ((at * 2_654_435_761 + layer) % 1000) as f64).collect())
            .collect();
        let split = choose(&activation, &[24576; 32], 4 << 30);
        let bytes = to_bytes(&split, &neurons);
        assert!(split.size_bytes > (4 << 30) - 256 * 24576);
        assert!(bytes.len() < 4 << 20);
    }
}
