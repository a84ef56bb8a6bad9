//! What a decoder calls its inputs and outputs.
//!
//! Exporters agree on most names; where a layout has its own (`genai_config.json` writes them down,
//! transformers' exporter derives them from its cache classes) it says so here.

/// The names of a decoder's inputs and outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderNames {
    /// Token ids, int `[B, T]`.
    pub input_ids: String,
    /// Embeddings in their place, float `[B, T, d_model]`.
    pub inputs_embeds: String,
    /// Int `[B, P + T]`.
    pub attention_mask: String,
    /// Int `[B, T]`, or `[rows, B, T]` in multimodal rotary embeddings.
    pub position_ids: String,
    /// Float `[B, T, vocabulary]`.
    pub logits: String,
    /// Inputs and outputs of the key/value cache, and of other states that run along.
    pub cache: Vec<CacheNames>,
    /// The last dimension of the cache, where the layout tells it: graphs may leave it open.
    pub head_size: Option<usize>,
}

/// An input of the cache with the outputs that may become it, one pattern each: `*` stands for the
/// layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheNames {
    /// The input.
    pub past: String,
    /// The output, the first of these that there is.
    pub present: Vec<String>,
}

impl CacheNames {
    pub(super) fn new(past: &str, present: &[&str]) -> CacheNames {
        CacheNames {
            past: past.to_owned(),
            present: present.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// What stands for the layer in `input`, where it is an input of this pattern.
    fn layer<'n>(&self, input: &'n str) -> Option<&'n str> {
        let (before, after) = self.past.split_once('*')?;
        let layer = input.strip_prefix(before)?.strip_suffix(after)?;
        (!layer.is_empty()).then_some(layer)
    }
}

impl Default for DecoderNames {
    /// The names of Hugging Face's and transformers.js' exports, which most follow.
    fn default() -> DecoderNames {
        DecoderNames {
            input_ids: "input_ids".to_owned(),
            inputs_embeds: "inputs_embeds".to_owned(),
            attention_mask: "attention_mask".to_owned(),
            position_ids: "position_ids".to_owned(),
            logits: "logits".to_owned(),
            cache: vec![
                CacheNames::new("past_key_values.*", &["present.*", "present_key_values.*"]),
                // LFM2's short convolutions.
                CacheNames::new("past_conv.*", &["present_conv.*"]),
            ],
            head_size: None,
        }
    }
}

impl DecoderNames {
    /// The outputs that may become the cache input `input`, or `None` where it is no such input.
    pub fn present(&self, input: &str) -> Option<Vec<String>> {
        self.cache.iter().find_map(|names| {
            let layer = names.layer(input)?;
            let present = names.present.iter().map(|name| name.replace('*', layer));
            Some(present.collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{CacheNames, DecoderNames};

    #[test]
    fn a_cache_input_knows_its_output() {
        let names = DecoderNames::default();
        let present = |input| Some(names.present(input)?.swap_remove(0));
        assert_eq!(
            present("past_key_values.3.key").as_deref(),
            Some("present.3.key")
        );
        assert_eq!(present("past_conv.0").as_deref(), Some("present_conv.0"));
        assert_eq!(present("past_key_values."), None);
        assert_eq!(present("input_ids"), None);

        let own = CacheNames::new("past_key_*_in", &["past_key_*_out"]);
        assert_eq!(own.layer("past_key_12_in"), Some("12"));
        assert_eq!(own.layer("past_key__in"), None);
        assert_eq!(own.layer("past_key_in"), None);
    }
}
