//! A tiny random PowerInfer model (sparse, with predictors) and its dense twin, its activation statistics, and its forward
//! pass in plain Rust to compare an engine's greedy tokens with. Everything here is made by arithmetic: nothing is copied.
#![allow(
    dead_code,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "shared by tests that use parts of it"
)]

use std::io::Write as _;

/// The sizes of a model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub width: usize,
    /// More than 1000: PowerInfer computes smaller layers in another way.
    pub neurons: usize,
    /// Of the predictors.
    pub rank: usize,
    pub heads: usize,
    pub context: u32,
}

/// 2.6 MB.
pub const TINY: Shape = Shape { layers: 2, width: 64, neurons: 1280, rank: 32, heads: 2, context: 512 };
pub const BOS: u32 = 1;
pub const EOS: u32 = 2;
const EPSILON: f32 = 1e-5;

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    Text(String),
    Uint(u32),
    Float(f32),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

#[derive(Clone)]
pub struct Weight {
    pub name: String,
    /// Fastest first.
    pub shape: Vec<usize>,
    pub numbers: Vec<f32>,
}

impl Weight {
    /// Vectors are F32, matrices F16.
    pub fn kind(&self) -> u32 {
        u32::from(self.shape.len() > 1)
    }

    pub fn size_bytes(&self) -> usize {
        self.numbers.len() * if self.kind() == 1 { 2 } else { 4 }
    }
}

#[derive(Clone)]
pub struct Tiny {
    pub shape: Shape,
    pub sparse: bool,
    pub metadata: Vec<(String, Meta)>,
    pub weights: Vec<Weight>,
}

/// The vocabulary: text, type (2 unknown, 3 control, 6 byte, 1 the rest).
pub fn vocabulary() -> Vec<(String, i32)> {
    let mut tokens = vec![("<unk>".to_owned(), 2), ("<s>".to_owned(), 3), ("</s>".to_owned(), 3)];
    tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    tokens.extend(["<|im_start|>", "<|im_end|>"].map(|text| (text.to_owned(), 3)));
    let letters = || ('a'..='z').chain('A'..='Z');
    tokens.push(("\u{2581}".to_owned(), 1));
    tokens.extend(('!'..='~').map(|c| (c.to_string(), 1)));
    tokens.extend(letters().map(|c| (format!("\u{2581}{c}"), 1)));
    tokens.extend("aeiou".chars().flat_map(|vowel| "nrstl".chars().map(move |c| (format!("{vowel}{c}"), 1))));
    tokens
}

impl Tiny {
    pub fn sparse() -> Self {
        Self::new(&TINY, true)
    }

    /// The same weights but for the feed-forward blocks, which have no predictors and another layout.
    pub fn dense() -> Self {
        Self::new(&TINY, false)
    }

    pub fn new(shape: &Shape, sparse: bool) -> Self {
        let Shape { layers, width, neurons, rank, .. } = *shape;
        let mut random = Random(0x5eed);
        let tokens = vocabulary();
        let mut weights = vec![
            random.matrix("token_embd.weight", width, tokens.len(), 1.0),
            ones("output_norm.weight", width),
            random.matrix("output.weight", width, tokens.len(), 0.3),
        ];
        // Single bytes are never the likeliest: its server holds them back until a character is whole.
        for (row, (_, kind)) in weights[2].numbers.chunks_exact_mut(width).zip(&tokens) {
            if *kind == 6 {
                row.fill(0.0);
            }
        }
        let spread = |length: usize| (length as f32).powf(-0.5);
        for layer in 0..layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            weights.extend(["attn_norm", "ffn_norm"].map(|part| ones(&name(part), width)));
            for part in ["attn_q", "attn_k", "attn_v", "attn_output"] {
                weights.push(random.matrix(&name(part), width, width, spread(width)));
            }
            for part in ["ffn_gate", "ffn_up"] {
                weights.push(random.matrix(&name(part), width, neurons, spread(width)));
            }
            let down = random.matrix(&name("ffn_down_t"), width, neurons, spread(neurons));
            let predictor = [
                random.matrix(&name("fc1"), width, rank, spread(width)),
                random.matrix(&name("fc2"), rank, neurons, spread(rank)),
            ];
            if sparse {
                weights.push(down);
                weights.extend(predictor);
            } else {
                weights.push(transposed(&down, &name("ffn_down")));
            }
        }
        Self { shape: *shape, sparse, metadata: metadata(shape, &tokens, sparse), weights }
    }

    pub fn weight(&self, name: &str) -> &Weight {
        self.weights.iter().find(|weight| weight.name == name).unwrap()
    }

    /// Where each tensor's data begins, counted from where all data begins.
    pub fn offsets(&self) -> Vec<usize> {
        let mut next = 0;
        let place = |weight: &Weight| {
            let offset = next;
            next = (next + weight.size_bytes()).next_multiple_of(32);
            offset
        };
        self.weights.iter().map(place).collect()
    }

    /// Everything before the data.
    pub fn head(&self) -> Vec<u8> {
        let mut file = if self.sparse { b"PWRI".to_vec() } else { b"GGUF".to_vec() };
        file.extend(3u32.to_le_bytes());
        file.extend((self.weights.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            file.extend(text(key));
            file.extend(value.to_bytes());
        }
        for (weight, offset) in self.weights.iter().zip(self.offsets()) {
            file.extend(text(&weight.name));
            file.extend((weight.shape.len() as u32).to_le_bytes());
            file.extend(weight.shape.iter().flat_map(|length| (*length as u64).to_le_bytes()));
            file.extend(weight.kind().to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = self.head();
        for weight in &self.weights {
            for number in &weight.numbers {
                match weight.kind() {
                    1 => file.extend_from_slice(&to_half(*number).to_le_bytes()),
                    _ => file.extend_from_slice(&number.to_le_bytes()),
                }
            }
            file.resize(file.len().next_multiple_of(32), 0);
        }
        file
    }

    pub fn size_bytes(&self) -> u64 {
        let data: usize = self.weights.iter().map(|weight| weight.size_bytes().next_multiple_of(32)).sum();
        (self.head().len() + data) as u64
    }
}

fn metadata(shape: &Shape, tokens: &[(String, i32)], sparse: bool) -> Vec<(String, Meta)> {
    let text = |text: &str| Meta::Text(text.to_owned());
    let mut all = vec![
        ("general.architecture", text("llama")),
        ("general.name", text("tiny")),
        ("general.file_type", Meta::Uint(1)),
        ("llama.context_length", Meta::Uint(shape.context)),
        ("llama.embedding_length", Meta::Uint(shape.width as u32)),
        ("llama.block_count", Meta::Uint(shape.layers as u32)),
        ("llama.feed_forward_length", Meta::Uint(shape.neurons as u32)),
        ("llama.rope.dimension_count", Meta::Uint((shape.width / shape.heads) as u32)),
        ("llama.attention.head_count", Meta::Uint(shape.heads as u32)),
        ("llama.attention.head_count_kv", Meta::Uint(shape.heads as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::Float(EPSILON)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens.iter().map(|token| token.0.clone()).collect())),
        ("tokenizer.ggml.scores", Meta::Floats((0..tokens.len()).map(|index| -(index as f32)).collect())),
        ("tokenizer.ggml.token_type", Meta::Ints(tokens.iter().map(|token| token.1).collect())),
        ("tokenizer.ggml.bos_token_id", Meta::Uint(BOS)),
        ("tokenizer.ggml.eos_token_id", Meta::Uint(EOS)),
        ("tokenizer.ggml.unknown_token_id", Meta::Uint(0)),
    ];
    if sparse {
        all.push(("powerinfer.sparse_threshold", Meta::Float(0.0)));
    }
    all.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Meta {
    fn to_bytes(&self) -> Vec<u8> {
        let array = |kind: u32, length: usize, items: Vec<u8>| {
            [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &(length as u64).to_le_bytes(), &items].concat()
        };
        match self {
            Self::Uint(number) => [4u32.to_le_bytes(), number.to_le_bytes()].concat(),
            Self::Float(number) => [6u32.to_le_bytes(), number.to_le_bytes()].concat(),
            Self::Text(value) => [&8u32.to_le_bytes()[..], &text(value)].concat(),
            Self::Texts(all) => array(8, all.len(), all.iter().flat_map(|item| text(item)).collect()),
            Self::Floats(all) => array(6, all.len(), all.iter().flat_map(|item| item.to_le_bytes()).collect()),
            Self::Ints(all) => array(5, all.len(), all.iter().flat_map(|item| item.to_le_bytes()).collect()),
        }
    }
}

fn ones(name: &str, width: usize) -> Weight {
    Weight { name: name.to_owned(), shape: vec![width], numbers: vec![1.0; width] }
}

fn transposed(weight: &Weight, name: &str) -> Weight {
    let (columns, rows) = (weight.shape[0], weight.shape[1]);
    let numbers = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
    let numbers = numbers.map(|at| weight.numbers[at]).collect();
    Weight { name: name.to_owned(), shape: vec![rows, columns], numbers }
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// Nearly a normal distribution: the sum of four even ones.
    fn number(&mut self, spread: f32) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|part| (bits >> (part * 16) & 0xffff) as f32 / 65536.0 - 0.5).sum();
        // Rounded to what the file can hold, so that the forward pass here has the same numbers.
        from_half(to_half(sum * 1.732 * spread))
    }

    fn matrix(&mut self, name: &str, columns: usize, rows: usize, spread: f32) -> Weight {
        let numbers = (0..columns * rows).map(|_| self.number(spread)).collect();
        Weight { name: name.to_owned(), shape: vec![columns, rows], numbers }
    }
}

/// To IEEE 754 binary16, for numbers whose size is below 65504; tiny ones become 0.
fn to_half(number: f32) -> u16 {
    let bits = number.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let rounded = (bits & 0x7fff_ffff) + 0x0fff + (bits >> 13 & 1);
    let exponent = (rounded >> 23) as i32 - 127 + 15;
    if exponent <= 0 { sign } else { sign | (exponent as u16) << 10 | (rounded >> 13 & 0x3ff) as u16 }
}

fn from_half(bits: u16) -> f32 {
    let exponent = u32::from(bits >> 10 & 31);
    let number = if exponent == 0 { 0 } else { (exponent + 127 - 15) << 23 | u32::from(bits & 0x3ff) << 13 };
    f32::from_bits(number | u32::from(bits & 0x8000) << 16)
}

/// How often each neuron of a layer fired, for some world.
pub fn activation(shape: &Shape, layer: usize) -> Vec<f32> {
    let mut random = Random(layer as u64);
    (0..shape.neurons).map(|_| (random.next() % 1000) as f32).collect()
}

/// A file of `torch.save` with one tensor of one dimension: `class` as PyTorch calls its storage, `bytes` its numbers.
pub fn torch_file(class: &str, length: usize, bytes: &[u8]) -> Vec<u8> {
    torch_archive(&torch_pickle(class, length), bytes)
}

pub fn torch_pickle(class: &str, length: usize) -> Vec<u8> {
    let name = |module: &str, name: &str| format!("c{module}\n{name}\n").into_bytes();
    let word = |word: &str| [&b"X"[..], &(word.len() as u32).to_le_bytes(), word.as_bytes(), b"q\x01"].concat();
    let number = |number: usize| [&b"J"[..], &(number as u32).to_le_bytes()].concat();
    [
        b"\x80\x02".to_vec(),
        name("torch._utils", "_rebuild_tensor_v2"),
        b"q\x00((".to_vec(),
        word("storage"),
        name("torch", class),
        word("0"),
        word("cpu"),
        number(length),
        b"tq\x05QK\x00".to_vec(),
        number(length),
        b"\x85q\x06K\x01\x85q\x07\x89".to_vec(),
        name("collections", "OrderedDict"),
        b"q\x08)Rq\x09tq\x0aRq\x0b.".to_vec(),
    ]
    .concat()
}

pub fn torch_archive(pickle: &[u8], numbers: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("data.pkl", pickle), ("byteorder", b"little"), ("data/0", numbers), ("version", b"3\n")] {
        archive.start_file(format!("activation/{name}"), stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// What tokens say, as its server writes it.
pub fn words(tokens: &[u32]) -> String {
    let vocabulary = vocabulary();
    let bytes = tokens.iter().flat_map(|token| match &vocabulary[*token as usize] {
        (text, 6) => vec![u8::from_str_radix(&text[3..5], 16).unwrap()],
        (_, 3) => vec![],
        (text, _) => text.replace('\u{2581}', " ").into_bytes(),
    });
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

/// The prompt `hi`, as the vocabulary cuts it.
pub fn hi() -> Vec<u32> {
    let vocabulary = vocabulary();
    let of = |text: &str| vocabulary.iter().position(|token| token.0 == text).unwrap() as u32;
    vec![BOS, of("\u{2581}h"), of("i")]
}

/// The names and bytes of a model's statistics.
pub fn activation_files(shape: &Shape) -> Vec<(String, Vec<u8>)> {
    let file = |layer| {
        let numbers: Vec<u8> = activation(shape, layer).iter().flat_map(|number| number.to_le_bytes()).collect();
        (format!("activation_{layer}.pt"), torch_file("FloatStorage", shape.neurons, &numbers))
    };
    (0..shape.layers).map(file).collect()
}

/// The greedy tokens after a prompt, as the engine computes them with one thread.
pub fn greedy(model: &Tiny, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let last = forward(model, &tokens);
        let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

/// Rows of a weight times a vector.
fn times(weight: &Weight, vector: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| row.iter().zip(vector).map(|(a, b)| a * b).sum();
    weight.numbers.chunks_exact(weight.shape[0]).map(row).collect()
}

fn normed(vector: &[f32]) -> Vec<f32> {
    let mean: f32 = vector.iter().map(|number| number * number).sum::<f32>() / vector.len() as f32;
    vector.iter().map(|number| number / (mean + EPSILON).sqrt()).collect()
}

fn add(to: &mut [f32], more: &[f32]) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
}

/// Rotary position embedding of neighbouring pairs.
fn rotated(vector: &[f32], size: usize, position: usize) -> Vec<f32> {
    let mut turned = vector.to_vec();
    for (pair, of) in turned.chunks_exact_mut(2).enumerate() {
        let angle = position as f32 * 10000f32.powf(-((pair * 2 % size) as f32) / size as f32);
        (of[0], of[1]) = (of[0] * angle.cos() - of[1] * angle.sin(), of[0] * angle.sin() + of[1] * angle.cos());
    }
    turned
}

/// The scores of every token at the last position.
fn forward(model: &Tiny, tokens: &[u32]) -> Vec<f32> {
    let Shape { layers, width, heads, .. } = model.shape;
    let embedding = model.weight("token_embd.weight");
    let row = |token: &u32| embedding.numbers[*token as usize * width..][..width].to_vec();
    let mut states: Vec<Vec<f32>> = tokens.iter().map(row).collect();
    for layer in 0..layers {
        let weight = |part: &str| model.weight(&format!("blk.{layer}.{part}.weight"));
        let inputs: Vec<Vec<f32>> = states.iter().map(|state| normed(state)).collect();
        let of = |part: &str| -> Vec<Vec<f32>> { inputs.iter().map(|input| times(weight(part), input)).collect() };
        let turned = |all: Vec<Vec<f32>>| -> Vec<Vec<f32>> {
            all.iter().enumerate().map(|(position, vector)| rotated(vector, width / heads, position)).collect()
        };
        let (queries, keys, values) = (turned(of("attn_q")), turned(of("attn_k")), of("attn_v"));
        for (position, state) in states.iter_mut().enumerate() {
            let seen = attention(heads, &queries[position], &keys[..=position], &values);
            add(state, &times(weight("attn_output"), &seen));
            let fed = feed_forward(model, layer, state);
            add(state, &fed);
        }
    }
    times(model.weight("output.weight"), &normed(states.last().unwrap()))
}

fn attention(heads: usize, query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f32> {
    let size = query.len() / heads;
    let mut seen = vec![0.0; query.len()];
    for head in 0..heads {
        let part = head * size..(head + 1) * size;
        let dot = |key: &Vec<f32>| query[part.clone()].iter().zip(&key[part.clone()]).map(|(a, b)| a * b).sum::<f32>();
        let scores: Vec<f32> = keys.iter().map(|key| dot(key) / (size as f32).sqrt()).collect();
        let most = scores.iter().copied().fold(f32::MIN, f32::max);
        let sum: f32 = scores.iter().map(|score| (score - most).exp()).sum();
        for (score, value) in scores.iter().zip(values) {
            let share = (score - most).exp() / sum;
            seen[part.clone()].iter_mut().zip(&value[part.clone()]).for_each(|(to, from)| *to += share * from);
        }
    }
    seen
}

/// Dense: SiLU(gate) * up, then down. Sparse: ReLU(gate) * up for the neurons that the predictor lets through.
fn feed_forward(model: &Tiny, layer: usize, state: &[f32]) -> Vec<f32> {
    let weight = |part: &str| model.weight(&format!("blk.{layer}.{part}.weight"));
    let input = normed(state);
    let (gate, up) = (times(weight("ffn_gate"), &input), times(weight("ffn_up"), &input));
    if !model.sparse {
        let inner: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
        return times(weight("ffn_down"), &inner);
    }
    let first: Vec<f32> = times(weight("fc1"), state).iter().map(|number| number.max(0.0)).collect();
    let predicted = times(weight("fc2"), &first);
    let mut sum = vec![0.0; state.len()];
    for (neuron, row) in weight("ffn_down_t").numbers.chunks_exact(state.len()).enumerate() {
        let fires = predicted[neuron] >= 0.0;
        let inner = if fires { gate[neuron].max(0.0) * up[neuron] } else { 0.0 };
        sum.iter_mut().zip(row).for_each(|(sum, number)| *sum += inner * number);
    }
    sum
}
