//! temp
fn main() {
    for path in std::env::args().skip(1) {
        let m = match kvw::onnx::ModelFile::open(path.as_ref(), &Default::default()) {
            Ok(m) => m,
            Err(e) => {
                println!("{path}\tERR {e}");
                continue;
            }
        };
        let index = kvw::graph::Index::new(m.graph());
        let mlps = kvw::graph::mlp::find(&index, None);
        let n: usize = mlps.iter().map(|m| m.sites.len()).sum();
        println!(
            "{path}\t{}\t{}\t{:?}\t{:?}",
            n,
            mlps.len(),
            mlps.iter().map(|m| m.layer).collect::<Vec<_>>(),
            mlps.iter()
                .map(|m| format!("{:?}{:?}{}", m.gating, m.tower, m.down().op))
                .collect::<std::collections::BTreeSet<_>>()
        );
    }
}
