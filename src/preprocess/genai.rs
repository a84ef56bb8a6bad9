//! What `genai_config.json` and onnxruntime-genai's `processor_config.json` say, in the words of Hugging
//! Face's `config.json` and `preprocessor_config.json`, so that families read one language.
//!
//! In: the two files of a folder that has no `config.json`. Out: JSON objects with the keys that
//! families ask for. Sources: onnxruntime-genai 0.18, `src/config.cpp`; onnxruntime-extensions 0.14,
//! `shared/api/image_transforms*.hpp` (the transforms' `attrs`).

use serde_json::{Map, Value, json};

/// The file that a folder of onnxruntime-genai has instead of `config.json`.
pub(super) const MAP: &str = "genai_config.json";

/// The keys of `config.json`, from the map.
pub(super) fn config(map: &Value) -> Value {
    let model = |key: &str| map.pointer(&format!("/model/{key}")).cloned();
    let mut config = Map::new();
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(key.to_owned(), value);
        }
    };
    set("model_type", model("type"));
    for key in [
        "image_token_id",
        "video_token_id",
        "eos_token_id",
        "bos_token_id",
    ] {
        set(key, model(key));
    }
    if model("vision").is_some() {
        let merge = model("vision/spatial_merge_size");
        set(
            "vision_config",
            Some(merge.map_or_else(|| json!({}), |merge| json!({"spatial_merge_size": merge}))),
        );
    }
    Value::Object(config)
}

/// The keys of `preprocessor_config.json`, from the list of transforms; `None` where it has another
/// form.
pub(super) fn image_processor(processor: &Value) -> Option<Value> {
    let transforms = processor.pointer("/processor/transforms")?.as_array()?;
    let mut settings = Map::new();
    // Written after transformers' processor of this class.
    if processor.pointer("/processor/name")?.as_str() == Some("qwen2_5_image_processor") {
        settings.insert(
            "image_processor_type".to_owned(),
            json!("Qwen2VLImageProcessor"),
        );
    }
    for transform in transforms {
        let operation = transform.get("operation")?;
        let attrs = operation.get("attrs");
        let mut take = |from: &str, to: &str| {
            if let Some(value) = attrs.and_then(|attrs| attrs.get(from)) {
                settings.insert(to.to_owned(), value.clone());
            }
        };
        match operation.get("type")?.as_str()? {
            "Resize" => {
                take("min_pixels", "min_pixels");
                take("max_pixels", "max_pixels");
            }
            "Rescale" => take("rescale_factor", "rescale_factor"),
            "Normalize" => {
                take("mean", "image_mean");
                take("std", "image_std");
            }
            "PatchImage" => {
                take("patch_size", "patch_size");
                take("temporal_patch_size", "temporal_patch_size");
                take("merge_size", "merge_size");
            }
            _ => {}
        }
    }
    Some(Value::Object(settings))
}
