#![no_main]

kvw_fuzz::target!("chat_templates");
