#![allow(warnings)]
use aitools::base::cancel::Cancel;
use aitools::build::toolchain::Finder;
use aitools::build::{self, *};
use aitools::report::*;
use std::sync::Arc;
struct P;
impl Reporter for P {
    fn report(&self, e: &Event) {
        match e {
            Event::Progressed { done, total, .. } if done % 5 != 0 => {}
            e => println!("{e:?}"),
        }
    }
}
fn main() {
    // source work driver cmake ninja targets(csv) defines(csv) outputs(csv glob) [cuda]
    let a: Vec<String> = std::env::args().skip(1).collect();
    let env: build::settings::Env = std::env::vars_os().collect();
    let cancel = Cancel::default();
    let w = std::path::PathBuf::from(&a[1]);
    let f = Finder::new(&env, &w, &cancel);
    println!("accelerators {:#?}", build::accelerator::detect(&f));
    println!("processor {} libc {:?}", build::toolchain::processor(&env), build::toolchain::c_library(&f));
    let cuda = a.get(8).is_some();
    let compilers = f.toolchain(cuda, false).unwrap();
    println!("{compilers:?}");
    let tool = |p: &str| ToolPath { path: p.into(), identity: "x".into() };
    let csv = |s: &str| s.split(',').filter(|s| !s.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let ask = BuildRequest {
        driver: a[2].clone().into(),
        source: a[0].clone().into(),
        folder: w.join("work"),
        prefix: w.join("prefix"),
        recipe: BuildRecipe {
            version: 1,
            define: csv(&a[6])
                .iter()
                .map(|d| {
                    let (k, v) = d.split_once('=').unwrap();
                    (k.to_owned(), v.to_owned())
                })
                .collect(),
            targets: csv(&a[5]),
            require: if cuda { vec!["CMAKE_CUDA_COMPILER".into()] } else { vec![] },
            build_type: "Release".into(),
            edits: vec![],
            outputs: csv(&a[7])
                .into_iter()
                .map(|g| OutputRule { glob: g, to: "bin".parse().unwrap(), required: true })
                .collect(),
            native: false,
        },
        cmake: tool(&a[3]),
        ninja: Some(tool(&a[4])),
        compilers,
        jobs: 2,
        env: env.clone(),
        log: w.join("log"),
        label: "try".into(),
    };
    println!("{:#?}", build::run(&ask, &Task::new(Arc::new(P), Cancel::default())));
}
