//! Any serde value travels, with tensors anywhere inside.

use std::collections::HashMap;

use farcall::Tensor;

use crate::functions::{Message, Part, add, echo_all, echo_message, eight, nothing};
use crate::harness::{Group, bounded, counting};

fn empty(id: u64) -> Message {
    Message { id, parts: Vec::new(), named: HashMap::new(), pair: (None, None), text: None }
}

#[test]
fn structs_enums_options_and_maps_hold_tensors() {
    bounded(|| {
        let group = Group::new(2);
        let inner = Message { parts: vec![Part::Newtype(counting(&[3]))], text: Some(String::new()), ..empty(2) };
        let message = Message {
            id: u64::MAX,
            parts: vec![
                Part::Unit,
                Part::Newtype(counting(&[2, 2])),
                Part::Tuple(200, None),
                Part::Tuple(201, Some(counting(&[1]))),
                Part::Struct { name: "näme 🦀".to_owned(), inner: Box::new(inner) },
            ],
            named: HashMap::from([("a".to_owned(), counting(&[5])), (String::new(), counting(&[0]))]),
            pair: (None, Some(counting(&[4]))),
            text: Some("text".to_owned()),
        };
        let back = group.agents[0].to("w1").call(echo_message, (&message,)).wait().expect("an echo");
        let shape = |tensor: &Tensor| (tensor.shape().to_vec(), tensor.to_vec::<f32>().expect("f32"));
        let counted = |n: usize| (0..n).map(|index| index as f32).collect::<Vec<_>>();
        assert_eq!((back.id, back.text.as_deref()), (u64::MAX, Some("text")));
        let [Part::Unit, Part::Newtype(square), Part::Tuple(200, None), Part::Tuple(201, Some(one)), last] =
            &back.parts[..]
        else {
            panic!("{:?}", back.parts)
        };
        assert_eq!((shape(square), shape(one)), ((vec![2, 2], counted(4)), (vec![1], counted(1))));
        let Part::Struct { name, inner } = last else { panic!("{last:?}") };
        let [Part::Newtype(three)] = &inner.parts[..] else { panic!("{inner:?}") };
        assert_eq!((name.as_str(), inner.id, shape(three)), ("näme 🦀", 2, (vec![3], counted(3))));
        assert_eq!(inner.text.as_deref(), Some(""));
        assert_eq!(back.named.len(), 2);
        assert_eq!((shape(&back.named["a"]), shape(&back.named[""])), ((vec![5], counted(5)), (vec![0], vec![])));
        assert!(back.pair.0.is_none());
        assert_eq!(back.pair.1.as_ref().map(shape), Some((vec![4], counted(4))));
        group.shutdown();
    });
}

#[test]
fn the_same_tensor_twice_arrives_twice() {
    bounded(|| {
        let group = Group::new(2);
        for len in [4, 100_000] {
            let x = counting(&[len]);
            let back = group.agents[0].to("w1").call(echo_all, (vec![x.clone(), x.clone()],)).wait().expect("an echo");
            let expected = x.as_slice::<f32>().expect("f32");
            assert_eq!(back.len(), 2);
            assert!(back.iter().all(|tensor| tensor.as_slice::<f32>().expect("f32") == expected));
        }
        group.shutdown();
    });
}

#[test]
fn an_empty_list_of_tensors_is_a_value() {
    bounded(|| {
        let group = Group::new(2);
        assert!(group.agents[0].to("w1").call(echo_all, (Vec::new(),)).wait().expect("an echo").is_empty());
        group.shutdown();
    });
}

#[test]
fn no_argument_and_no_result_are_a_call_too() {
    bounded(|| {
        let group = Group::new(2);
        group.agents[0].to("w1").call(nothing, ()).wait().expect("nothing");
        group.shutdown();
    });
}

#[test]
fn eight_arguments_arrive_in_their_places() {
    bounded(|| {
        let group = Group::new(2);
        let h = Tensor::from_slice(&[9_u8, 8], &[2]).expect("two bytes");
        let args = (true, 255, -300, u32::MAX, 0.5, -0.25, "seven", &h);
        let text = group.agents[0].to("w1").call(eight, args).wait().expect("a text");
        assert_eq!(text, "true 255 -300 4294967295 0.5 -0.25 seven [9, 8]");
        group.shutdown();
    });
}

#[test]
fn integers_of_any_magnitude_arrive() {
    bounded(|| {
        let group = Group::new(2);
        for x in [0, 1, -1, 63, 64, -64, -65, i64::MAX, i64::MIN] {
            assert_eq!(group.agents[0].to("w1").call(add, (x, 0)).wait().expect("a sum"), x);
        }
        group.shutdown();
    });
}
