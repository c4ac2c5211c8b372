from vim_timm.validate import main

raise SystemExit(main())
