//! Masks of constrained requests.

use std::sync::Arc;

use minisgl_core::batch::Batch;
use minisgl_core::constraint::Constraint;
use minisgl_core::request::Request;
use minisgl_core::rules::Rules;

use super::scheduler;
use crate::support::expected::{Allowed, allowed};
use crate::support::rule::Rule;
use crate::support::{SMALL, exactly};

#[test]
fn a_mask_that_never_changes_comes_when_its_slot_is_taken_and_no_more() {
    let allowing = Arc::new(Rules::default().allowing(vec![5, 9]).unwrap());
    let allows_9 = |seed: &u32| {
        let is_mask = matches!(allowed(*seed, &[9]), Allowed::Mask(_));
        is_mask && matches!(allowed(*seed, &[]), Allowed::Mask(mask) if mask >> 9 & 1 == 1)
    };
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new((0..).find(allows_9).unwrap(), 0));
    let mut scheduler = scheduler();
    let slots = SMALL.running;
    let mut submit = |rules, constraint| {
        let request = Request { rules, constraint, ..Request::new(&[1, 2], exactly(3)) };
        scheduler.submit(request).expect("it can run").ticket
    };
    let free = submit(None, None);
    let kept = submit(Some(&allowing), None);
    let both = submit(Some(&allowing), Some(&constraint));
    let mut batch = Batch::new(&SMALL);
    let mut of_step = || {
        assert!(scheduler.schedule(&mut batch));
        let masks: Vec<_> = batch.masks().collect();
        let rows = batch.owners().iter().zip(batch.rows());
        let rows: Vec<_> = rows.map(|(owner, row)| (*owner, row.mask)).collect();
        let mut written = vec![[0]; masks.len()];
        let owners = masks.iter().map(|(owner, _)| *owner);
        owners.zip(&mut written).for_each(|(owner, mask)| scheduler.write_mask(owner, mask));
        scheduler.complete(&batch, &vec![9; rows.len()], &[], &mut |_| ());
        (masks, rows, written)
    };
    let (masks, rows, written) = of_step();
    assert_eq!(masks, [(both, 0), (kept, slots + 1)]);
    assert_eq!(rows, [(free, 0), (kept, 1 + slots + 1), (both, 1)]);
    assert_eq!(written[1], [1 << 5 | 1 << 9]);
    assert!(written[0] == [1 << 9] || written[0] == [1 << 5 | 1 << 9], "{written:?}");
    let (masks, rows, _) = of_step();
    assert_eq!(masks, [(both, 0)], "one that stays is there");
    assert_eq!(rows, [(free, 0), (kept, 1 + slots + 1), (both, 1)]);
}
