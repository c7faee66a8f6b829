//! The flags that the command lines share, written down once.
//!
//! argh has no way to include one struct's flags in another's, so a macro writes them behind a command's own:
//!
//! ```
//! use argh::FromArgs;
//! use minisgl::SamplingParams;
//!
//! minisgl::with_shared_flags! {
//!     /// does something with a model
//!     struct Flags {
//!         /// where the model is
//!         #[argh(option)]
//!         model: String,
//!     }
//! }
//!
//! let flags = Flags::from_args(&["command"], &["--model", "tiny", "--no-overlap", "--temperature", "0.6"]).unwrap();
//! assert_eq!(flags.model, "tiny");
//! assert!(!flags.engine_options().overlap);
//! assert_eq!(flags.sampling(SamplingParams::default()).temperature, 0.6);
//! ```

/// Defines a command line: its own flags, then those of the engine and of sampling. It gets the methods
/// `engine_options` and `sampling`, the latter changing the parameters given to it as the flags say.
#[macro_export]
macro_rules! with_shared_flags {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($own:tt)* }) => {
        $(#[$meta])*
        #[derive(::argh::FromArgs)]
        $vis struct $name {
            $($own)*

            /// where to compute: auto (default: a GPU where there is one), cpu or cuda
            #[argh(option, default = "::std::default::Default::default()")]
            backend: $crate::BackendChoice,
            /// which GPU, where there are several (default 0)
            #[argh(option, default = "0")]
            device: usize,
            /// which GPU kernels: auto (default), portable or hopper
            #[argh(option, default = "::std::default::Default::default()")]
            kernels: $crate::KernelChoice,
            /// requests that run at once (default 256)
            #[argh(option)]
            max_running: Option<u32>,
            /// tokens of a prefill step (default 16384 on a GPU, 1024 on the CPU)
            #[argh(option)]
            max_prefill_tokens: Option<u32>,
            /// tokens of a KV page, a power of two (default 16, or the device's least)
            #[argh(option)]
            page_size: Option<u32>,
            /// pages of the KV cache (default: as many as memory holds)
            #[argh(option)]
            num_pages: Option<u32>,
            /// share of the free memory that KV pages take (default 0.9)
            #[argh(option)]
            memory_ratio: Option<f64>,
            /// tokens of a sequence, prompt and output (default: all that the model takes)
            #[argh(option)]
            max_seq_len: Option<u32>,
            /// rows of the largest recorded decode step (default 256; 0 records none)
            #[argh(option)]
            max_graph_batch: Option<u32>,
            /// wait for each step before the next is scheduled
            #[argh(switch)]
            no_overlap: bool,
            /// compute equal prefixes anew for each request
            #[argh(switch)]
            no_prefix_cache: bool,
            /// order of admission: given (default) or longest-output-first
            #[argh(option, from_str_fn($crate::parse_order), default = "::std::default::Default::default()")]
            order: $crate::Order,
            /// how freely tokens are drawn; 0 takes the most probable one
            #[argh(option)]
            temperature: Option<f32>,
            /// draw among the k most probable tokens (0: all)
            #[argh(option)]
            top_k: Option<u32>,
            /// draw among the most probable tokens that hold this mass, in (0, 1]
            #[argh(option)]
            top_p: Option<f32>,
            /// draw among tokens at least this many times as probable as the most probable one
            #[argh(option)]
            min_p: Option<f32>,
        }

        impl $name {
            /// The engine that the flags ask for.
            fn engine_options(&self) -> $crate::Options {
                let default = $crate::Options::default();
                $crate::Options {
                    backend: self.backend,
                    device: self.device,
                    kernels: self.kernels,
                    max_running: self.max_running.unwrap_or(default.max_running),
                    max_prefill_tokens: self.max_prefill_tokens,
                    page_size: self.page_size,
                    num_pages: self.num_pages,
                    memory_ratio: self.memory_ratio.unwrap_or(default.memory_ratio),
                    max_seq_len: self.max_seq_len,
                    max_graph_batch: self.max_graph_batch.unwrap_or(default.max_graph_batch),
                    overlap: default.overlap && !self.no_overlap,
                    prefix_cache: !self.no_prefix_cache,
                    order: self.order,
                    ..default
                }
            }

            /// Sampling as the flags ask for, and as `default` where they don't.
            fn sampling(&self, default: $crate::SamplingParams) -> $crate::SamplingParams {
                $crate::SamplingParams {
                    temperature: self.temperature.unwrap_or(default.temperature),
                    top_k: self.top_k.unwrap_or(default.top_k),
                    top_p: self.top_p.unwrap_or(default.top_p),
                    min_p: self.min_p.unwrap_or(default.min_p),
                    ..default
                }
            }
        }
    };
}
