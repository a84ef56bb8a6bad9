#![no_main]

kvw_fuzz::target!("parquet_tables");
