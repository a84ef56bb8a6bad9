#![no_main]

kvw_fuzz::target!("json_trees");
