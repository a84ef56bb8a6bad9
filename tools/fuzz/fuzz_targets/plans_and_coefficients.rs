#![no_main]

kvw_fuzz::target!("plans_and_coefficients");
