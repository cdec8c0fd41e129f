//! The tiny model as its makers would have published it: safetensors with a configuration and a SentencePiece vocabulary, and
//! the predictors as PyTorch saves them. Everything here is made by arithmetic: nothing is copied.
#![allow(clippy::unwrap_used, reason = "test support")]

use std::io::Write as _;

use super::model::{Tiny, Weight, vocabulary};

type Files = Vec<(String, Vec<u8>)>;

/// `model.safetensors`, `config.json` and `tokenizer.model`.
pub fn model(tiny: &Tiny) -> Files {
    let shape = tiny.shape;
    let config = serde_json::json!({
        "model_type": "llama", "hidden_act": "relu", "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary().len(), "hidden_size": shape.width, "intermediate_size": shape.neurons,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "max_position_embeddings": shape.context,
    });
    vec![
        ("config.json".to_owned(), config.to_string().into_bytes()),
        ("model.safetensors".to_owned(), safetensors(tiny)),
        ("tokenizer.model".to_owned(), sentencepiece()),
    ]
}

/// `model_0.pt`, `model_1.pt` and so on, and the threshold.
pub fn predictor(tiny: &Tiny) -> Files {
    let layer = |layer| {
        let weights = ["fc1", "fc2"].map(|part| (part, tiny.weight(&format!("blk.{layer}.{part}.weight"))));
        (format!("model_{layer}.pt"), torch(&weights))
    };
    let threshold = ("config.json".to_owned(), b"{ \"sparse_threshold\": 0.0 }".to_vec());
    (0..tiny.shape.layers).map(layer).chain([threshold]).collect()
}

/// The name that transformers gives a weight, and its rows in the order that it has them; none for what is no part of it.
fn published(tiny: &Tiny, weight: &Weight) -> Option<(String, Vec<usize>, Vec<f32>)> {
    let numbers = weight.numbers.clone();
    let sizes: Vec<usize> = weight.shape.iter().rev().copied().collect();
    let whole = match weight.name.as_str() {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Some((name.to_owned(), sizes, numbers));
    }
    let (layer, part) = weight.name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let (name, sizes, numbers) = match part {
        "attn_norm" => ("input_layernorm", sizes, numbers),
        "ffn_norm" => ("post_attention_layernorm", sizes, numbers),
        "attn_q" => ("self_attn.q_proj", sizes, unpaired(tiny, &numbers)),
        "attn_k" => ("self_attn.k_proj", sizes, unpaired(tiny, &numbers)),
        "attn_v" => ("self_attn.v_proj", sizes, numbers),
        "attn_output" => ("self_attn.o_proj", sizes, numbers),
        "ffn_gate" => ("mlp.gate_proj", sizes, numbers),
        "ffn_up" => ("mlp.up_proj", sizes, numbers),
        "ffn_down_t" => {
            let (rows, columns) = (sizes[0], sizes[1]);
            let turned = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
            ("mlp.down_proj", vec![columns, rows], turned.map(|index| numbers[index]).collect())
        }
        _ => return None,
    };
    Some((format!("model.layers.{layer}.{name}.weight"), sizes, numbers))
}

/// Rotated pairs lie side by side in a GGUF; in a published model half a head apart.
fn unpaired(tiny: &Tiny, numbers: &[f32]) -> Vec<f32> {
    let (width, size) = (tiny.shape.width, tiny.shape.width / tiny.shape.heads);
    let row = |row: usize| {
        let (head, of) = (row / size, row % size);
        head * size + of % (size / 2) * 2 + of / (size / 2)
    };
    (0..width).flat_map(|to| numbers[row(to) * width..][..width].to_vec()).collect()
}

/// <https://github.com/huggingface/safetensors#format>
fn safetensors(tiny: &Tiny) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, sizes, numbers) in tiny.weights.iter().filter_map(|weight| published(tiny, weight)) {
        let begin = data.len();
        data.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        let entry = serde_json::json!({ "dtype": "F32", "shape": sizes, "data_offsets": [begin, data.len()] });
        header.insert(name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// A `ModelProto` of sentencepiece_model.proto: the pieces, and that single bytes are among them.
fn sentencepiece() -> Vec<u8> {
    let number = |field: u32, value: u32| [varint(field << 3), varint(value)].concat();
    let nested =
        |field: u32, bytes: &[u8]| [varint(field << 3 | 2), varint(bytes.len() as u32), bytes.to_vec()].concat();
    let mut file = Vec::new();
    for (index, (text, kind)) in vocabulary().iter().enumerate() {
        let score = [varint(2 << 3 | 5), (-(index as f32)).to_le_bytes().to_vec()].concat();
        file.extend(nested(1, &[nested(1, text.as_bytes()), score, number(3, *kind as u32)].concat()));
    }
    // BPE, and bytes for what has no piece.
    file.extend(nested(2, &[number(3, 2), number(4, vocabulary().len() as u32), number(35, 1)].concat()));
    file.extend(nested(3, &nested(1, b"identity")));
    file
}

fn varint(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// `torch.save` of a dictionary of matrices.
fn torch(weights: &[(&str, &Weight)]) -> Vec<u8> {
    let global = |module: &str, name: &str| format!("c{module}\n{name}\n").into_bytes();
    let word = |word: &str| [&b"X"[..], &(word.len() as u32).to_le_bytes(), word.as_bytes()].concat();
    let number = |number: usize| [&b"J"[..], &(number as u32).to_le_bytes()].concat();
    let mut pickle = b"\x80\x02}(".to_vec();
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (index, (part, weight)) in weights.iter().enumerate() {
        let (rows, columns) = (weight.shape[1], weight.shape[0]);
        pickle.extend(word(&format!("{part}.weight")));
        pickle.extend(global("torch._utils", "_rebuild_tensor_v2"));
        pickle.extend(b"((");
        pickle
            .extend([word("storage"), global("torch", "FloatStorage"), word(&index.to_string()), word("cpu")].concat());
        pickle.extend([number(rows * columns), b"tQK\x00".to_vec()].concat());
        pickle.extend(
            [number(rows), number(columns), b"\x86".to_vec(), number(columns), b"K\x01\x86\x89".to_vec()].concat(),
        );
        pickle.extend([global("collections", "OrderedDict"), b")RtR".to_vec()].concat());
        archive.start_file(format!("archive/data/{index}"), stored).unwrap();
        let bytes: Vec<u8> = weight.numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        archive.write_all(&bytes).unwrap();
    }
    pickle.extend(b"u.");
    archive.start_file("archive/data.pkl", stored).unwrap();
    archive.write_all(&pickle).unwrap();
    archive.finish().unwrap().into_inner()
}
