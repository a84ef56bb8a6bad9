//! Every reader of somebody else's bytes, against damaged files: none panics, and what a reader promises
//! holds whatever it is given.
//!
//! `cargo test --test fuzz` runs a fixed number of inputs for each target, the same every time.
//! `tools/hostile/fuzz.sh` runs them in rotation for as long as one likes, each time from another seed. An input
//! that fails is left in `target/fuzz/NAME/`, also where the process died of it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvw::bundle::Bundle;
use kvw::check::Policy;
use kvw::dataset::{self, ReadOptions};
use kvw::edit::{self, Receipt};
use kvw::eval::Evidence;
use kvw::files::contain::Root;
use kvw::files::{json, safetensors};
use kvw::kvw::{Draws, load_coefficients, load_part, load_plan, save_coefficients, save_plan};
use kvw::limits;
use kvw::onnx::{Limits, ModelFile, Storage, tensors};
use kvw::preprocess::template::ChatTemplate;
use kvw::preprocess::{Feed, ModelDir, Tokenizer, image};
use kvw::provenance::{key::PrivateKey, key::PublicKey, model_signing, sums};
use kvw::sweep::Sweep;

/// Inputs of a target where no time is given.
const INPUTS: usize = 250;

/// Where a target's input lies, and the folder that is its alone.
struct Place {
    folder: PathBuf,
    input: PathBuf,
}

impl Place {
    fn of(target: &str) -> Place {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join("../fuzz")
            .join(target);
        fs::create_dir_all(&folder).unwrap();
        Place {
            input: folder.join("input"),
            folder,
        }
    }

    /// With the input under another name.
    fn named(mut self, name: &str) -> Place {
        self.input = self.folder.join(name);
        self
    }
}

fn fixture(path: &str) -> Vec<u8> {
    fs::read(fixtures(path)).unwrap()
}

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

/// One good input or two, damaged in one to four places.
fn damaged(seeds: &[Vec<u8>], words: &[&str], draws: &mut Draws) -> Vec<u8> {
    let mut data = seeds[draws.below(seeds.len())].clone();
    for _ in 0..=draws.below(4) {
        if data.is_empty() {
            data = seeds[draws.below(seeds.len())].clone();
        }
        let at = draws.below(data.len().max(1)).min(data.len());
        let stretch = 1 << draws.below(9);
        let end = (at + stretch).min(data.len());
        match draws.below(9) {
            0 => data.truncate(at),
            1 if at < data.len() => data[at] ^= 1 << draws.below(8),
            2 => {
                let byte = [0, 0x7f, 0x80, 0xff][draws.below(4)];
                data[at..end].fill(byte);
            }
            3 => {
                let copy = data[at..end].repeat(1 + draws.below(3));
                data.splice(at..at, copy);
            }
            4 => drop(data.drain(at..end)),
            5 => {
                for byte in &mut data[at..end] {
                    *byte = u8::try_from(draws.below(256)).unwrap();
                }
            }
            6 => {
                let other = &seeds[draws.below(seeds.len())];
                let from = draws.below(other.len().max(1)).min(other.len());
                let to = (from + stretch).min(other.len());
                data.splice(at..end, other[from..to].iter().copied());
            }
            7 if !words.is_empty() => {
                let word = words[draws.below(words.len())];
                data.splice(at..at, word.bytes());
            }
            // A number as formats write it, at its edge.
            _ => {
                let number = [
                    0,
                    1,
                    255,
                    256,
                    u64::from(u32::MAX),
                    1 << 31,
                    1 << 62,
                    u64::MAX,
                ];
                let number = number[draws.below(number.len())].to_le_bytes();
                let width = [1, 2, 4, 8][draws.below(4)];
                let end = (at + width).min(data.len());
                data.splice(at..end, number[..width].iter().copied());
            }
        }
    }
    data
}

/// Runs `read` on damaged files, each written to the place's input.
fn fuzz(place: &Place, seeds: &[Vec<u8>], words: &[&str], read: impl Fn(&Path, &[u8])) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds: Option<u64> = number("KVW_FUZZ_SECONDS");
    let mut draws = Draws::new(number("KVW_FUZZ_SEED").unwrap_or(1));
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut inputs = 0;
    for seed in seeds {
        fs::write(&place.input, seed).unwrap();
        read(&place.input, seed);
    }
    while until.map_or(inputs < INPUTS, |until| Instant::now() < until) {
        let data = damaged(seeds, words, &mut draws);
        fs::write(&place.input, &data).unwrap();
        let start = Instant::now();
        read(&place.input, &data);
        let took = start.elapsed();
        assert!(
            took < Duration::from_secs(30),
            "{took:?} for {}",
            place.input.display()
        );
        inputs += 1;
    }
    let name = place
        .folder
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    println!("{name}: {inputs} inputs");
    fs::remove_dir_all(&place.folder).unwrap();
}

#[test]
fn onnx_files() {
    let seeds = [
        fixture("exports/genai-qwen2-fp16/model.onnx"),
        fixture("exports/genai-phi2-fp32/model.onnx"),
        fixture("exports/genai-layout-qwen2_5_vl/model.onnx"),
    ];
    let place = Place::of("onnx").named("model.onnx");
    fuzz(
        &place,
        &seeds,
        &["If", "MatMul", "/etc/passwd", "location"],
        |path, _| {
            let Ok(model) = ModelFile::open(path, &Limits::default()) else {
                return;
            };
            for tensor in tensors(model.proto()) {
                let Ok(storage) = model.storage(tensor) else {
                    continue;
                };
                if let Storage::External { file, .. } = &storage {
                    assert!(file.starts_with(model.root().boundary()), "{file:?}");
                }
                if let Storage::Inline(span) = storage {
                    assert!(span.end().unwrap() <= model.size());
                }
                let _ = model.bytes(tensor);
            }
            if let Ok(bundle) = Bundle::open(path) {
                let _ = edit::inspect(&bundle);
            }
        },
    );
}

#[test]
fn external_locations() {
    let place = Place::of("locations");
    let model = place.folder.join("model");
    fs::create_dir_all(model.join("onnx")).unwrap();
    fs::write(model.join("weights"), "w").unwrap();
    fs::write(place.folder.join("secret"), "s").unwrap();
    let link = |target: &str, name: &str| {
        let name = model.join(name);
        if name.symlink_metadata().is_err() {
            std::os::unix::fs::symlink(target, name).unwrap();
        }
    };
    link("../secret", "up");
    link("..", "parent");
    link("/", "root");
    let root = Root::of(&model).unwrap();
    let boundary = root.boundary().to_owned();
    let seeds = [
        "weights",
        "onnx/../weights",
        "./weights",
        "up",
        "parent/secret",
        "../secret",
        "root/etc/passwd",
    ];
    let seeds = seeds.map(|seed| seed.as_bytes().to_vec());
    fuzz(
        &place,
        &seeds,
        &[
            "..",
            "/",
            "\\",
            "parent/",
            "root/",
            "up",
            "\u{0}",
            "C:",
            "*/_ORT_MEM_ADDR_/*",
        ],
        |_, data| {
            let Ok(location) = std::str::from_utf8(data) else {
                return;
            };
            for base in ["", "onnx"] {
                if let Ok(opened) = root.open_from(base, location) {
                    assert!(
                        opened.path.starts_with(&boundary),
                        "{location:?} → {:?}",
                        opened.path
                    );
                    assert!(opened.file.metadata().unwrap().is_file());
                }
            }
        },
    );
}

/// A plan and coefficients as kvw writes them.
fn written(place: &Place) -> (Vec<u8>, Vec<u8>) {
    use kvw::graph::Moment;
    use kvw::kvw::{Coefficients, Plan};
    let layer = "2".parse();
    let path = place.folder.join("seed");
    let layers = [(layer.unwrap_or_else(|_| panic!("a layer")), 5)];
    let gates = [(layers[0].0, vec![0.5, 1.0, 1e-9, 0.25, 0.75])];
    let plan = Plan {
        gates: gates.into(),
        rule: "kvw".into(),
        parameters: serde_json::json!({"gamma": 0.4, "layers": "2-2"}),
        steps: 3,
    };
    save_plan(
        &path,
        &plan,
        serde_json::json!({"model": {"layers": []}}),
        true,
    )
    .unwrap();
    let of_plan = fs::read(&path).unwrap();
    let none = Coefficients::new(Moment::Absolute, &layers);
    save_coefficients(&path, &none, serde_json::json!({"data": "x"}), true).unwrap();
    (of_plan, fs::read(&path).unwrap())
}

#[test]
fn plans_and_coefficients() {
    let place = Place::of("plans").named("forget.plan");
    let (plan, coefficients) = written(&place);
    fuzz(
        &place,
        &[plan, coefficients],
        &[
            "\"F32\"",
            "\"shape\"",
            "18446744073709551615",
            "layers.2.gate",
        ],
        |path, data| {
            if let Ok((plan, _)) = load_plan(path) {
                assert!(plan.gates.values().flatten().all(|gate| gate.is_finite()));
            }
            let _ = load_coefficients(path);
            let _ = load_part(path);
            if safetensors::check_header(data).is_ok() {
                assert!(data.len() >= 8);
            }
        },
    );
}

#[test]
fn ready_made_inputs() {
    let seeds = [
        fixture("layouts/feeds/npz/0.npz"),
        fixture("layouts/feeds/safetensors/0.safetensors"),
    ];
    fuzz(
        &Place::of("feeds"),
        &seeds,
        &["'descr'", "(4294967296, 4294967296)", "|O", ".npy"],
        |path, _| {
            if let Ok(feed) = Feed::read(path) {
                assert_eq!(feed.input_ids.len(), feed.answer_mask.len());
            }
        },
    );
}

#[test]
fn json_trees() {
    let seeds = [
        "config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ]
    .map(|name| fixture(&format!("oracle/qwen2_vl/model/{name}")));
    let words = [
        "[",
        "]",
        "{",
        "}",
        "\"a\":",
        ",",
        "null",
        "1e999",
        "\\ud800",
        "0,0,0,0,0,0",
    ];
    fuzz(&Place::of("json"), &seeds, &words, |_, data| {
        let ours = json::read_tree(data);
        let theirs = serde_json::from_slice::<serde_json::Value>(data);
        match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs),
            (Ok(_), Err(error)) => panic!("read what serde_json refuses: {error}"),
            (Err(error), Ok(_)) => {
                let text = error.to_string();
                assert!(
                    text.contains("twice") || text.contains("many times"),
                    "{text}"
                );
            }
            (Err(_), Err(_)) => {}
        }
    });
}

#[test]
fn model_folders() {
    let place = Place::of("folders").named("config.json");
    fs::create_dir_all(place.folder.join("onnx")).unwrap();
    let model = fixture("oracle/qwen2_vl/model/onnx/embed_tokens.onnx");
    fs::write(place.folder.join("onnx/embed_tokens.onnx"), model).unwrap();
    let seeds = [
        "oracle/qwen2_vl",
        "oracle/llava",
        "families/gemma3",
        "families/phi3_v",
        "families/idefics3",
    ]
    .map(|family| fixture(&format!("{family}/model/config.json")));
    let folder = place.folder.clone();
    fuzz(
        &place,
        &seeds,
        &["text_config", "-1", "1e308", "null", "99999999999"],
        |_, _| {
            let _ = Bundle::open(&folder);
            let _ = kvw::preprocess::open_family(&folder).map(drop);
        },
    );
}

#[test]
fn tokenizers() {
    let seeds = [
        fixture("oracle/qwen2_vl/model/tokenizer.json"),
        fixture("families/gemma3/model/tokenizer.json"),
    ];
    fuzz(
        &Place::of("tokenizer"),
        &seeds,
        &[
            "\"Regex\":\"(a+)+$\"",
            "\"merges\":[[\"\",\"\"]]",
            "4294967295",
        ],
        |path, _| {
            if let Ok(tokenizer) = Tokenizer::open(path) {
                let text = "What is in the picture? \u{e9}\u{1f600} <|im_start|>";
                if let Ok(encoded) = tokenizer.encode(text, true) {
                    assert!(encoded.offsets.iter().all(|range| range.start <= range.end));
                    let _ = tokenizer.decode(&encoded.ids, false);
                }
            }
        },
    );
}

#[test]
fn chat_templates() {
    let place = Place::of("template").named("chat_template.jinja");
    fs::write(place.folder.join("config.json"), r#"{"model_type": "x"}"#).unwrap();
    let seeds = [
        "oracle/qwen2_vl",
        "oracle/llava",
        "families/mllama",
        "families/smolvlm",
    ]
    .map(|family| fixture(&format!("{family}/model/chat_template.jinja")));
    let model = ModelDir::open(&place.folder).unwrap();
    let words = [
        "{{",
        "}}",
        "{%",
        "%}",
        "for x in ",
        "range(1000000000)",
        "* 1000000000",
        "| tojson(indent=99)",
        "| indent(99999999)",
        "messages",
        "[::-1]",
        "(",
        ")",
        "{% set ",
    ];
    let messages = serde_json::json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]);
    fuzz(&place, &seeds, &words, |_, _| {
        if let Ok(template) = ChatTemplate::open(&model)
            && let Ok(text) = template.render(&messages, true)
        {
            // 64 bytes a unit of fuel.
            assert!(text.len() as u64 <= 64 * limits::TEMPLATE_FUEL + limits::TEMPLATE_BYTES);
        }
    });
}

#[test]
fn pictures() {
    let seeds = [
        "progressive.jpg",
        "subsampled.jpg",
        "cmyk.jpg",
        "lossy_alpha.webp",
        "lossless.webp",
        "interlaced.png",
        "rgba_16_bit.png",
        "palette_transparent.png",
        "exif_6.jpg",
        "xmp_6.png",
    ]
    .map(|name| fixture(&format!("processor/qwen2_vl/images/{name}")));
    fuzz(
        &Place::of("picture"),
        &seeds,
        &["IHDR", "IDAT", "Exif", "VP8X"],
        |path, data| {
            if let Ok(pixels) = image::decode_rgb(path, data) {
                assert!(pixels.len() as u64 <= 3 * limits::IMAGE_PIXELS);
            }
        },
    );
}

#[test]
fn jsonl() {
    let place = Place::of("jsonl").named("data.jsonl");
    let image = fixtures("oracle/data/images/p000_0.png");
    let seed = format!(
        "{{\"image\": {image:?}, \"question\": \"q\", \"answer\": \"a b\", \"name\": \"a\", \"facts\": {{\"job\": \"b\"}}, \"options\": [\"x\", \"y\"], \"correct\": 1}}\n"
    );
    fuzz(
        &place,
        &[seed.into_bytes(), fixture("oracle/data/retain.jsonl")],
        &["\n", "null", "[]", "{}", "\"id\": 1,", "/dev/zero"],
        |path, _| {
            if let Ok(data) = dataset::read_jsonl(path) {
                assert!(
                    data.samples
                        .iter()
                        .all(|sample| !sample.answer.trim().is_empty())
                );
            }
        },
    );
}

#[test]
fn parquet_tables() {
    let place = Place::of("parquet").named("train.parquet");
    let seeds = ["benchmarks/clear/forget05/train-00000-of-00002.parquet"].map(fixture);
    fuzz(&place, &seeds, &["PAR1"], |path, _| {
        let address = format!("clear:{}", path.display());
        let _ = dataset::read(Path::new(&address), &ReadOptions { max_bad_rows: 9 });
    });
}

#[test]
fn policies() {
    let words = [
        "[[",
        "]]",
        "= nan",
        "= 1e999",
        "[thresholds]",
        "'''",
        "a.a.a.a = ",
    ];
    fuzz(
        &Place::of("policy"),
        &[fixture("demo/policy.toml")],
        &words,
        |path, data| {
            let _ = Policy::read(path);
            if let Ok(text) = std::str::from_utf8(data) {
                let _ = Policy::parse("policy.toml", text);
            }
        },
    );
}

#[test]
fn evaluations_sweeps_and_receipts() {
    // The head of a large evaluation has every kind of thing in it; a whole one is too slow to damage often.
    let seeds = [
        fixture("demo/reference/sweep.json"),
        fixture("demo/retrained.evaluation.json"),
    ];
    let words = ["null", "[]", "{}", "-1", "1e308", "\"schema_version\": 99,"];
    fuzz(&Place::of("evaluation"), &seeds, &words, |path, _| {
        let _ = Evidence::read(path);
        let _ = Sweep::read(path);
        let _ = Receipt::read(path);
    });
}

#[test]
fn signatures_sums_and_keys() {
    let key = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEp6h3pEYkVlTNAsCfhwyP9c5Cy5rk\nGBVvPmMZCGbHDpIn4r0Tb1c4sTQH7HRM1uvM5ODIXTVPpXGx6WoJIxkpNQ==\n-----END PUBLIC KEY-----\n";
    let signature = r#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"},"tlogEntries":[]},"dsseEnvelope":{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"AAAA","keyid":""}]}}"#;
    let line = format!(
        "{}  config.json\n{}  onnx/model.onnx\n",
        "a".repeat(64),
        "0".repeat(64)
    );
    let seeds = [key, signature, &line].map(|seed| seed.as_bytes().to_vec());
    fuzz(
        &Place::of("signature"),
        &seeds,
        &["../", "e30=", "\n", "-----END", "\"a\":1,"],
        |path, data| {
            let _ = model_signing::read(path);
            let _ = PublicKey::read(path);
            let _ = PrivateKey::read(path);
            if let Ok(text) = std::str::from_utf8(data) {
                let _ = sums::decode(path, text);
            }
        },
    );
}

/// A journal with the digest that its bytes ask for: else every damaged one ends at the digest.
fn sealed(mut journal: Vec<u8>) -> Vec<u8> {
    let number = |bytes: &[u8]| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap()));
    let Some(footer) = journal.len().checked_sub(56).filter(|at| *at >= 16) else {
        return journal;
    };
    let index_at = number(&journal[footer..footer + 8])
        .unwrap_or(0)
        .clamp(16, footer);
    let mut hasher = kvw::files::Sha256Hasher::default();
    hasher.update(&journal[..16]);
    let mut at = 16;
    while at + 80 <= index_at {
        hasher.update(&journal[at..at + 80]);
        let length = u32::from_le_bytes(journal[at + 4..at + 8].try_into().unwrap());
        at = at.saturating_add(80).saturating_add(length as usize);
    }
    hasher.update(&journal[index_at..footer + 16]);
    let digest = hasher.finish();
    journal[footer + 16..footer + 48].copy_from_slice(digest.as_bytes());
    journal
}

#[test]
fn journals() {
    use kvw::files::journal::{self, Index, Journal, JournalFile, JournalWriter, Range};
    use kvw::files::{FolderLock, Sha256};
    let place = Place::of("journal");
    let folder = place.folder.join("model");
    fs::create_dir_all(&folder).unwrap();
    let place = place.named(&format!("model/{}", journal::JOURNAL));
    let _ = fs::remove_file(&place.input);
    let (secret, model) = (place.folder.join("secret"), folder.join("a.bin"));
    let (old, new) = ([1; 700], [2; 700]);
    fs::write(&secret, old).unwrap();
    fs::write(&model, old).unwrap();
    let up = folder.join("up");
    if up.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("../secret", up).unwrap();
    }
    let lock = FolderLock::take(&folder).unwrap();
    let mut staged = journal::begin(&folder, &lock).unwrap();
    let mut writer = JournalWriter::begin(&mut staged).unwrap();
    for (offset, len) in [(0, 100), (512, 188)] {
        let range = Range {
            file: 0,
            offset,
            old: Sha256::of_bytes(&old[..len]),
            new: Sha256::of_bytes(&new[..len]),
        };
        writer.record(&range, &new[..len]).unwrap();
    }
    let mut index = Index {
        files: vec![JournalFile {
            path: "a.bin".into(),
            bytes: 700,
        }],
        whole: Default::default(),
    };
    index.set("kvw.json", Some(b"{}"));
    index.set("model.sig", None);
    writer.finish(&index).unwrap();
    staged.commit().unwrap();
    let seed = fs::read(&place.input).unwrap();
    let words = [
        "../secret",
        "up",
        "/etc/passwd",
        "\"a.bin\"",
        "null",
        "18446744073709551615",
        "kvw.json",
    ];
    fuzz(&place, &[seed], &words, |path, data| {
        for journal in [data.to_vec(), sealed(data.to_vec())] {
            fs::write(&model, old).unwrap();
            fs::write(path, journal).unwrap();
            let _ = Journal::open(path);
            let rolled = journal::roll_forward(&folder, &lock);
            assert_eq!(fs::read(&secret).unwrap(), old);
            let now = fs::read(&model).unwrap();
            assert_eq!(now.len(), old.len());
            assert!(rolled.is_ok() || now == old, "{rolled:?}: half a patch");
        }
    });
}
