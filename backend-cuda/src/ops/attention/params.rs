//! The kernels' parameters, as `attention_work.cuh`, Hopper's `prefill_work.cuh` and the portable `attention_prefill.cuh` declare them.

use crate::memory::Address;
use crate::param::plain_params;

/// Of decode rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodeParams {
    pub(super) plan: Address,
    pub(super) page_table: Address,
    /// The part's first row's.
    pub(super) q: Address,
    pub(super) k: Address,
    pub(super) v: Address,
    pub(super) out: Address,
    pub(super) partials: Address,
    pub(super) arrived: Address,
    /// Of a divided step's other half: its plan, and where its blocks count the turns that they have taken; or null.
    pub(super) other_plan: Address,
    pub(super) other_taken: Address,
    pub(super) arrived_count: u32,
    pub(super) table_width: u32,
    pub(super) page_shift: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) window: u32,
}

/// Of prefill rows on Hopper, beside the maps of queries, keys and values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillParams {
    pub(super) plan: Address,
    pub(super) rows: Address,
    pub(super) page_table: Address,
    pub(super) out: Address,
    pub(super) kept: Address,
    pub(super) arrived: Address,
    pub(super) taken: Address,
    pub(super) table_width: u32,
    pub(super) page_shift: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) window: u32,
}

/// Of prefill rows on Hopper with keys and values in fp8, behind the maps: the pages whose scales are theirs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptPages {
    pub(super) k: Address,
    pub(super) v: Address,
}

/// Of prefill rows elsewhere.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct PortablePrefillParams {
    pub(super) plan: Address,
    pub(super) rows: Address,
    pub(super) page_table: Address,
    pub(super) q: Address,
    pub(super) k: Address,
    pub(super) v: Address,
    pub(super) out: Address,
    pub(super) table_width: u32,
    pub(super) page_shift: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) window: u32,
}

plain_params!(DecodeParams, PrefillParams, KeptPages, PortablePrefillParams);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::assert_declared;

    #[test]
    fn both_sides_declare_the_same() {
        assert_declared!(
            &["attention/attention_work.cuh"],
            "DecodeParams",
            DecodeParams {
                plan,
                page_table,
                q,
                k,
                v,
                out,
                partials,
                arrived,
                other_plan,
                other_taken,
                arrived_count,
                table_width,
                page_shift,
                kv_heads,
                group,
                window,
            }
        );
        assert_declared!(
            &["hopper/attention/prefill_work.cuh"],
            "PrefillParams",
            PrefillParams {
                plan,
                rows,
                page_table,
                out,
                kept,
                arrived,
                taken,
                table_width,
                page_shift,
                kv_heads,
                group,
                window,
            }
        );
        assert_declared!(&["hopper/attention/prefill_work.cuh"], "KeptPages", KeptPages { k, v });
        assert_declared!(
            &["portable/attention_prefill.cuh"],
            "PrefillParams",
            PortablePrefillParams {
                plan,
                rows,
                page_table,
                q,
                k,
                v,
                out,
                table_width,
                page_shift,
                kv_heads,
                group,
                window,
            }
        );
    }
}
