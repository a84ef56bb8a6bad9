#![no_main]

kvw_fuzz::target!("external_locations");
